"""Resume is exact: the run that was interrupted is the run that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.cost import built_stage
from configs.ids import parse_checkpoint_id
from configs.reasons import ExitReason
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Result, Run, assert_same_bits, read_state, run_attempts

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]  # fixtures hold many runs

Resumed = tuple[DirStore, dict[Any, Result], dict[Any, Result]]
Moved = tuple[DirStore, dict[tuple[int, int], Result], dict[int, Result]]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "sgd": {"name": "sgd", "lr": 0.05, "weight_decay": 0.01},
}
PRECISIONS = ("fp32", "bf16")
VARIANTS = [(stage, optimizer, precision) for stage in range(4) for optimizer in OPTIMIZERS for precision in PRECISIONS]


def spec_of(stage: int, optimizer: str, precision: str) -> Any:
    return tiny_spec(
        zero={"stage": stage},
        optim=OPTIMIZERS[optimizer],
        train={"precision": precision},
        checkpoint={"every_steps": 3},
        schedule={"total_steps": 7},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """Each variant run to its end, and again from its checkpoint at step 3 by other processes."""
    root = tmp_path_factory.mktemp("resume")
    whole = [Run(make_attempt(spec_of(*variant), 2, 2 * i + 1)) for i, variant in enumerate(VARIANTS)]
    resumed = [
        Run(make_attempt(spec_of(*variant), 2, 2 * i + 2, resume_from=saved_at(3, 2 * i + 1)))
        for i, variant in enumerate(VARIANTS)
    ]
    first = run_ranks(2, run_attempts, whole, str(root))[0]
    second = run_ranks(2, run_attempts, resumed, str(root))[0]
    return DirStore(root), dict(zip(VARIANTS, first, strict=True)), dict(zip(VARIANTS, second, strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_resumed_run_has_the_same_bits(runs: Resumed, variant: tuple[int, str, str]) -> None:
    store, whole, resumed = runs
    assert whole[variant].outcome.reason is resumed[variant].outcome.reason is ExitReason.COMPLETED
    assert resumed[variant].losses == whole[variant].losses[3:]
    number = 2 * VARIANTS.index(variant) + 1
    first, state = read_state(store, saved_at(7, number).prefix)
    second, again = read_state(store, saved_at(7, number + 1).prefix)
    assert_same_bits(state, again)
    assert {kind for kind, _ in state} == {"weight"} | (
        {"exp_avg", "exp_avg_sq"} if variant[1] == "adamw" else {"momentum_buffer"}
    )
    assert (first.optimizer_step, second.optimizer_step) == (7, 7)
    assert first.parent is None
    assert second.parent is not None
    assert (second.parent.attempt, second.parent.step) == (number, 3)


def test_checkpoint_moves_on_with_training(
    runs: Resumed,
) -> None:
    """Or the comparison above would compare nothing."""
    store, whole, resumed = runs
    assert resumed[VARIANTS[0]].events[0][:2] == ("training.resumed", "continues from step 3")
    _, early = read_state(store, saved_at(3, 1).prefix)
    _, late = read_state(store, saved_at(7, 1).prefix)
    for key, tensor in early.items():
        assert not torch.equal(tensor, late[key]), key
    committed = [parse_checkpoint_id(id_)[1] for id_ in whole[VARIANTS[0]].checkpoints]
    assert committed == [3, 6, 7]
    assert whole[VARIANTS[0]].events == [], "the control plane says that a checkpoint was committed, once"


SOURCES = [(0, 1), (1, 2), (2, 3), (3, 2)]
TARGETS = [(stage, world_size) for world_size in (1, 2, 3) for stage in range(4)]


def elastic_spec(stage: int) -> Any:
    return tiny_spec(
        zero={"stage": stage},
        train={"global_batch_size": 12, "micro_batch_size": 2},
        checkpoint={"every_steps": 3},
        resources={"workers": {"min": 1, "max": 3}, "gpus_per_worker": 0},
    )


def number_of(source: int, target: tuple[int, int], continued: bool) -> int:
    return 100 + source * 50 + TARGETS.index(target) * 2 + continued


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Moved:
    """States saved by each source, loaded by each target and saved again; and trained on from step 3 by each target."""
    root = tmp_path_factory.mktemp("moved")
    saved: dict[tuple[int, int], Result] = {}
    for number, (stage, world_size) in enumerate(SOURCES, start=1):
        run = Run(make_attempt(elastic_spec(stage), world_size, number))
        saved[stage, world_size] = run_ranks(world_size, run_attempts, [run], str(root))[0][0]
    loaded: dict[int, Result] = {}
    for world_size in (1, 2, 3):
        runs = [
            Run(
                make_attempt(
                    elastic_spec(target[0]),
                    world_size,
                    number_of(source, target, continued),
                    resume_from=saved_at(3 if continued else 6, source),
                )
            )
            for target in TARGETS
            if target[1] == world_size
            for source in range(1, len(SOURCES) + 1)
            for continued in (False, True)
            if not continued or source == 4
        ]
        results = run_ranks(world_size, run_attempts, runs, str(root))[0]
        loaded |= {run.attempt.number: result for run, result in zip(runs, results, strict=True)}
    return DirStore(root), saved, loaded


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_state_moves_between_stages_and_world_sizes(
    moved: Moved,
    source: tuple[int, int],
    target: tuple[int, int],
) -> None:
    store, saved, loaded = moved
    assert saved[source].outcome.reason is ExitReason.COMPLETED
    number = SOURCES.index(source) + 1
    again = number_of(number, target, continued=False)
    assert loaded[again].outcome.reason is ExitReason.COMPLETED, loaded[again].outcome
    before, state = read_state(store, saved_at(6, number).prefix)
    after, state_again = read_state(store, saved_at(6, again).prefix)
    assert (before.zero_stage, before.world_size) == source
    stage, world_size = target
    assert (after.zero_stage, after.world_size) == (built_stage(stage, world_size), world_size)
    assert_same_bits(state, state_again)
    assert after.optimizer_step == before.optimizer_step == 6


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("source", [(3, 2)], ids=str)
def test_training_goes_on_elsewhere_with_the_same_losses(
    moved: Moved,
    source: tuple[int, int],
    target: tuple[int, int],
) -> None:
    _, saved, loaded = moved
    result = loaded[number_of(SOURCES.index(source) + 1, target, continued=True)]
    assert result.losses == pytest.approx(saved[source].losses[3:], abs=1e-5)


def test_other_training_is_refused(tmp_path: Path) -> None:
    spec = tiny_spec(schedule={"total_steps": 2})
    other = tiny_spec(schedule={"total_steps": 2}, optim={"lr": 0.02})
    runs = [Run(make_attempt(spec, 1)), Run(make_attempt(other, 1, 2, resume_from=saved_at(2)))]
    first, second = run_ranks(1, run_attempts, runs, str(tmp_path))[0]
    assert first.outcome.reason is ExitReason.COMPLETED
    assert second.outcome.reason is ExitReason.SPEC_INVALID
    assert second.outcome.error_type == "CheckpointMismatch"
    assert "training fingerprint" in second.outcome.message
