"""The loop's boundaries: orders, evaluation, what is logged, and gradients that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vit
from configs.layout import checkpoints_prefix
from configs.reasons import ExitReason
from configs.states import Desired
from tests.fakes.dir_store import DirStore
from tests.fakes.recording_reporter import RecordingReporter
from tests.ranks import run_ranks
from tests.workers.attempts import JOB, make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Result, Run, assert_same_bits, read_state, run_attempts, train_directly
from workers.attempt import RankOutcome
from workers.checkpoint import Progress, load, read_manifest
from workers.control import ControlWord, Word
from workers.distributed import Ranks
from workers.engine import DeepSpeedEngine, Update, build_engine
from workers.owned import moment, owned

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]  # fixtures hold many runs


# -- orders ------------------------------------------------------------------------------------------------------------
def ordered_spec(**parts: Any) -> Any:
    return tiny_spec(**({"schedule": {"total_steps": 12}, "zero": {"stage": 2}} | parts))


ORDERS: dict[str, dict[int, tuple[int, Desired]]] = {
    "one rank hears stop": {1: (4, Desired.STOP)},
    "pause outranks yield": {0: (4, Desired.YIELD), 1: (4, Desired.PAUSE)},
    "yield": {0: (4, Desired.YIELD)},
    "at once": {0: (0, Desired.PAUSE)},
    "at the end": {0: (12, Desired.STOP)},
}


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> tuple[DirStore, dict[str, list[Result]]]:
    """Jobs that were ordered to leave, and last the one that was not."""
    root = tmp_path_factory.mktemp("ordered")
    runs = [Run(make_attempt(ordered_spec(), 2, number), orders) for number, orders in enumerate(ORDERS.values(), 1)]
    runs.append(Run(make_attempt(ordered_spec(), 2, 20)))
    by_rank = run_ranks(2, run_attempts, runs, str(root))
    resumed = Run(make_attempt(ordered_spec(), 2, 21, resume_from=saved_at(5, 1)))
    again = run_ranks(2, run_attempts, [resumed], str(root))
    results = [list(results) for results in zip(*by_rank, strict=True)] + [[result[0] for result in again]]
    return DirStore(root), dict(zip([*ORDERS, "left alone", "resumed"], results, strict=True))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("one rank hears stop", ExitReason.USER_CANCELLED),
        ("pause outranks yield", ExitReason.PAUSED),
        ("yield", ExitReason.PREEMPTED),
    ],
)
def test_all_ranks_leave_at_the_same_step_with_a_checkpoint(
    ordered: tuple[DirStore, dict[str, list[Result]]], name: str, reason: ExitReason
) -> None:
    store, results = ordered
    outcomes = {result.outcome for result in results[name]}
    # Said at the boundary after step 4, read at the next.
    assert outcomes == {RankOutcome(reason, "", 5, 5)}
    assert read_manifest(store, saved_at(5, list(ORDERS).index(name) + 1).prefix).step == 5


def test_an_order_that_waits_already_is_followed_after_the_first_step(
    ordered: tuple[DirStore, dict[str, list[Result]]],
) -> None:
    store, results = ordered
    first, second = (result.outcome for result in results["at once"])
    assert first == second
    assert (first.reason, first.step) == (ExitReason.PAUSED, 1)
    number = list(ORDERS).index("at once") + 1
    saved = [key for key, _ in store.list(checkpoints_prefix(JOB)) if f"-a{number:04d}/manifest" in key]
    assert len(saved) == 1


def test_an_order_after_the_last_step_comes_too_late(ordered: tuple[DirStore, dict[str, list[Result]]]) -> None:
    _, results = ordered
    assert [result.outcome.reason for result in results["at the end"]] == [ExitReason.COMPLETED] * 2


def test_a_run_that_left_goes_on_as_if_it_had_not(ordered: tuple[DirStore, dict[str, list[Result]]]) -> None:
    store, results = ordered
    assert results["one rank hears stop"][0].losses + results["resumed"][0].losses == results["left alone"][0].losses
    assert_same_bits(read_state(store, saved_at(12, 20).prefix)[1], read_state(store, saved_at(12, 21).prefix)[1])


def exchange_words(ranks: Ranks) -> list[Word]:
    control = ControlWord(ranks)
    orders = [Desired.RUN, Desired.STOP if ranks.rank == 1 else Desired.YIELD, Desired.RUN, Desired.RUN]
    failures = [None, None, ExitReason.FENCED if ranks.rank == 0 else ExitReason.STORAGE_ERROR, None]
    uploaded = [0, ranks.rank, 1, 2]
    words = [Word(*parts) for parts in zip(orders, failures, uploaded, strict=True)]
    read = [control.exchange(word) for word in words]
    return [*read, control.drain(), control.drain(), control.agree(Word(num_uploaded=5 - ranks.rank))]


def test_the_control_word_is_read_one_boundary_later_and_the_gravest_wins() -> None:
    first, second = run_ranks(2, exchange_words)
    assert first == second
    assert first == [
        Word(),
        Word(),
        Word(Desired.STOP, None, 0),
        Word(Desired.RUN, ExitReason.FENCED, 1),
        Word(Desired.RUN, None, 2),
        Word(),
        Word(Desired.RUN, None, 4),
    ]


# -- evaluation and logging --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[DirStore, dict[str, list[Result]]]:
    root = tmp_path_factory.mktemp("evaluated")
    every = {"eval": {"every_steps": 2, "at_end": True, "batch_size": 4}, "checkpoint": {"every_steps": 4}}
    jobs = {
        "every": Run(make_attempt(ordered_spec(schedule={"total_steps": 5}, **every), 2, 1)),
        "interrupted": Run(make_attempt(ordered_spec(**every), 2, 2), {1: (2, Desired.STOP)}),
        "sparse": Run(make_attempt(ordered_spec(schedule={"total_steps": 8}, train={"log_every_steps": 3}), 2, 3)),
        "at the end only": Run(make_attempt(ordered_spec(schedule={"total_steps": 3}, eval={"at_end": True}), 2, 4)),
    }
    by_rank = run_ranks(2, run_attempts, list(jobs.values()), str(root))
    results = dict(zip(jobs, (list(results) for results in zip(*by_rank, strict=True)), strict=True))
    spec = ordered_spec(schedule={"total_steps": 3}, eval={"at_end": True})
    again = {
        "resumed at the end": Run(make_attempt(spec, 2, 5, resume_from=saved_at(3, 4))),
        "resumed unmeasured": Run(make_attempt(ordered_spec(**every), 2, 6, resume_from=saved_at(2, 2))),
        "resumed measured": Run(
            make_attempt(ordered_spec(schedule={"total_steps": 5}, **every), 2, 7, resume_from=saved_at(4, 1))
        ),
    }
    by_rank = run_ranks(2, run_attempts, list(again.values()), str(root))
    return DirStore(root), results | dict(zip(again, map(list, zip(*by_rank, strict=True)), strict=True))


def test_evaluation_keeps_its_cadence_and_comes_at_the_end(
    evaluated: tuple[DirStore, dict[str, list[Result]]],
) -> None:
    store, results = evaluated
    metrics = results["every"][0].metrics
    for name in ("eval/top1", "eval/top5", "eval/loss", "eval/num_examples"):
        assert list(metrics[name]) == [2, 4, 5]
    assert set(metrics["eval/num_examples"].values()) == {21.0}
    assert not any(name.startswith("eval/") for name in results["every"][1].metrics)
    assert list(results["at the end only"][0].metrics["eval/top1"]) == [3]
    assert not any(name.startswith("eval/") for name in results["sparse"][0].metrics)
    saved = read_manifest(store, saved_at(4, 1).prefix).metrics
    assert saved["eval/loss"] == metrics["eval/loss"][4]


def test_an_order_does_not_wait_for_the_end_of_an_evaluation(
    evaluated: tuple[DirStore, dict[str, list[Result]]],
) -> None:
    _, results = evaluated
    for result in results["interrupted"]:
        assert result.outcome == RankOutcome(ExitReason.USER_CANCELLED, "", 2, 2)
        assert "eval/top1" not in result.metrics
    assert "evaluating" in results["interrupted"][0].phases


def test_a_run_resumed_at_its_end_still_evaluates_and_completes(
    evaluated: tuple[DirStore, dict[str, list[Result]]],
) -> None:
    _, results = evaluated
    resumed, first = results["resumed at the end"][0], results["at the end only"][0]
    assert resumed.outcome == RankOutcome(ExitReason.COMPLETED, "", 3, 3)
    assert resumed.metrics["eval/loss"] == first.metrics["eval/loss"]
    assert "train/loss" not in resumed.metrics


def test_an_evaluation_that_an_order_cut_off_is_made_up_for_on_resume(
    evaluated: tuple[DirStore, dict[str, list[Result]]],
) -> None:
    _, results = evaluated
    resumed, measured = results["resumed unmeasured"][0], results["resumed measured"][0]
    assert list(resumed.metrics["eval/loss"]) == [2, 4, 6, 8, 10, 12]
    # The same model was measured by the run that was left alone.
    assert resumed.metrics["eval/loss"][2] == results["every"][0].metrics["eval/loss"][2]
    assert list(measured.metrics["eval/loss"]) == [5]


def test_metrics_are_logged_at_their_cadence(evaluated: tuple[DirStore, dict[str, list[Result]]]) -> None:
    _, results = evaluated
    first, second = results["sparse"]
    assert list(first.metrics["train/loss"]) == [1, 3, 6, 8]
    assert list(second.metrics["perf/step_time_s/rank-00001"]) == [1, 3, 6, 8]
    assert all(name.endswith("/rank-00001") for name in second.metrics)


# -- gradients that are not finite -------------------------------------------------------------------------------------
class Flaky:
    """An engine whose gradient is NaN on rank 1 at the given steps."""

    def __init__(self, engine: DeepSpeedEngine, ranks: Ranks, bad_steps: set[int]) -> None:
        self._engine = engine
        self._bad_steps = bad_steps if ranks.rank == 1 else set()
        self._step = 0
        self.forward = engine.forward
        self.evaluating = engine.evaluating

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * float("nan") if self._step in self._bad_steps else loss)

    def step(self, lr: float) -> Update:
        self._step += 1
        return self._engine.step(lr)


def train_flaky(
    ranks: Ranks, stages: list[int], bad_steps: set[int], root: str
) -> list[tuple[RankOutcome, list[Any], list[float], Any]]:
    """Train at each stage with a Flaky engine: outcome, events, losses and the last state on this rank."""
    results = []
    for stage in stages:
        reporter = RecordingReporter()
        spec = tiny_spec(zero={"stage": stage}, schedule={"total_steps": 8})
        outcome, engine = train_directly(
            ranks, spec, stage + 1, DirStore(root), reporter, lambda engine: Flaky(engine, ranks, bad_steps)
        )
        state = {
            (run.name, kind): run.of(tensor).numpy().copy()  # arrays: torch would send file descriptors
            for run in owned(engine)
            for kind, tensor in (("weight", run.flat), ("exp_avg", moment(engine, run.flat, "exp_avg")))
        }
        results.append((outcome, reporter.events, list(reporter.metrics.get("train/loss", {}).values()), state))
    return results


@pytest.fixture(scope="module")
def flaky(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Any]]]:
    """By case, by rank, by stage."""
    folder = tmp_path_factory.mktemp("flaky")
    stages = [0, 1, 2, 3]
    return {
        "healthy": run_ranks(2, train_flaky, stages, set(), str(folder / "a")),
        "two bad steps": run_ranks(2, train_flaky, stages, {3, 5}, str(folder / "b")),
        "three in a row": run_ranks(2, train_flaky, stages, {3, 4, 5}, str(folder / "c")),
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(flaky: dict[str, list[list[Any]]], stage: int) -> None:
    for rank in (0, 1):
        outcome, events, losses, state = flaky["two bad steps"][rank][stage]
        assert outcome == RankOutcome(ExitReason.COMPLETED, "", 8, 8)
        assert all(np.isfinite(array).all() for array in state.values())
        if rank == 0:
            healthy_losses = flaky["healthy"][rank][stage][2]
            assert losses[:4] == healthy_losses[:4]
            skipped = [data for kind, _, data in events if kind == "step.skipped"]
            assert [data["step"] for data in skipped] == [4, 6]
            assert [data["positions"] for data in skipped] == [[48, 64], [80, 96]]
            # The batch after the skipped one is another batch, seen by the weights of before.
            assert losses[4] != healthy_losses[4]
            assert losses[4] == pytest.approx(flaky["two bad steps"][0][0][2][4], abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_too_many_in_a_row_end_with_nan_loss(flaky: dict[str, list[list[Any]]], stage: int) -> None:
    outcomes = [flaky["three in a row"][rank][stage][0] for rank in (0, 1)]
    assert {(outcome.reason, outcome.step) for outcome in outcomes} == {(ExitReason.NAN_LOSS, 6)}
    assert "3 steps in a row" in outcomes[0].message
    assert "at step 6" in outcomes[0].message


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_skipped_step_changes_no_weight_and_no_moment(flaky: dict[str, list[list[Any]]], stage: int) -> None:
    """Three skipped steps end training where step 3 left it; the other case differs, so this can fail."""
    for rank in (0, 1):
        state = flaky["three in a row"][rank][stage][3]
        healthy = flaky["healthy"][rank][stage][3]
        assert any(not np.array_equal(state[key], healthy[key]) for key in state)
        assert all(np.isfinite(array).all() for array in state.values())


def skip_and_compare(ranks: Ranks, stage: int) -> dict[str, Any]:
    """One step, one skipped step, bits before and after; then one more."""
    spec = tiny_spec(zero={"stage": stage})
    engine = build_engine(vit.build(spec.model.vit(), seed=3), spec, ranks, 4)
    images = torch.randn(4, 3, 8, 8)

    def step(factor: float) -> Update:
        for _ in range(2):
            engine.backward(engine.forward(images).float().square().mean() * factor + engine.forward(images)[0, 0])
        update = engine.step(0.01)
        return replace(update, grad_norm=float(update.grad_norm))  # torch would send a file descriptor

    def bits() -> list[Tensor]:
        tensors = [
            tensor
            for run in owned(engine)
            for tensor in (run.of(run.flat), *(run.of(moment(engine, run.flat, m)) for m in ("exp_avg", "exp_avg_sq")))
        ]
        return [tensor.clone() for tensor in tensors]

    def adam_step() -> float:
        run = next(iter(owned(engine)))
        return float(moment(engine, run.flat, "step"))

    updates, steps = [step(1.0)], [adam_step()]
    before = bits()
    updates.append(step(float("inf") if ranks.rank == 1 else 1.0))
    steps.append(adam_step())
    unchanged = all(torch.equal(a, b) for a, b in zip(before, bits(), strict=True))
    updates.append(step(1.0))
    steps.append(adam_step())
    changed = not all(torch.equal(a, b) for a, b in zip(before, bits(), strict=True))
    return {"updates": updates, "steps": steps, "unchanged": unchanged, "changed": changed}


def skip_at_all_stages(ranks: Ranks) -> list[dict[str, Any]]:
    return [skip_and_compare(ranks, stage) for stage in (0, 1, 2, 3)]


def test_a_skipped_update_leaves_every_bit_and_adams_step() -> None:
    for by_stage in run_ranks(2, skip_at_all_stages):
        for seen in by_stage:
            assert [update.applied for update in seen["updates"]] == [True, False, True]
            assert seen["steps"] == [1.0, 1.0, 2.0]
            assert seen["unchanged"]
            assert seen["changed"]
            assert math.isfinite(seen["updates"][2].grad_norm)
            assert math.isinf(seen["updates"][1].grad_norm)


class _Skipless:
    """Of DeepSpeed's engine what a step needs; its gradient norm cannot be read without waiting for the device."""

    def __init__(self) -> None:
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def was_step_applied(self) -> bool:
        return True

    def step(self) -> None:
        pass

    def get_global_grad_norm(self) -> Tensor:
        return torch.empty((), device="meta")


def test_a_step_does_not_wait_for_the_norm_it_reports() -> None:
    assert DeepSpeedEngine(_Skipless(), 1, None).step(0.1).applied


def test_nan_from_the_data_on_ends_with_nan_loss(tmp_path: Path) -> None:
    """Pixels divided by next to nothing are infinite: every gradient is NaN from the first step."""
    spec = tiny_spec(data={"std": [1e-42]}, zero={"stage": 1})
    result = run_ranks(1, run_attempts, [Run(make_attempt(spec, 1))], str(tmp_path))[0][0]
    assert (result.outcome.reason, result.outcome.step) == (ExitReason.NAN_LOSS, 3)
    assert len([event for event in result.events if event[0] == "step.skipped"]) == 3


def test_skipped_steps_are_in_the_manifest_and_survive_resume(tmp_path: Path) -> None:
    run_ranks(2, train_flaky, [1], {6, 7}, str(tmp_path))
    manifest = read_manifest(DirStore(tmp_path), saved_at(8, 2).prefix)
    assert (manifest.step, manifest.optimizer_step) == (8, 6)
    assert (manifest.skipped_steps, manifest.nonfinite_steps) == (2, 2)
    assert manifest.position == 8 * 16
    again = run_ranks(1, resume_alone, str(tmp_path), manifest.training_fingerprint)[0]
    assert again == Progress(8, 2, 2)


def resume_alone(ranks: Ranks, root: str, fingerprint: str) -> Progress:
    spec = tiny_spec(zero={"stage": 0})
    engine = build_engine(vit.build(spec.model.vit(), seed=9), spec, ranks, 4)
    progress = load(engine, DirStore(root), saved_at(8, 2).prefix, fingerprint)
    assert float(moment(engine, next(iter(owned(engine))).flat, "step")) == 6.0
    return progress
