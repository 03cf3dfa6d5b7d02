"""The same job gives the same losses whatever it runs on: ZeRO stage, number of workers, accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.reasons import ExitReason
from tests.ranks import run_ranks
from tests.workers.attempts import make_attempt, tiny_spec
from tests.workers.rank_jobs import Result, Run, run_attempts

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]  # fixtures hold many runs

# Dropout is on in the tiny job; without it, the micro-batch size cannot matter.
NO_DROPOUT: dict[str, Any] = {"dropout": 0.0, "drop_path": 0.0}
STAGES = (0, 1, 2, 3)
EVAL = {"every_steps": 3, "at_end": True, "batch_size": 4}


def train_all(world_size: int, specs: dict[Any, Any], folder: Path) -> dict[Any, Result]:
    """Rank 0's result of each job, all in one launch."""
    runs = [Run(make_attempt(spec, world_size, number)) for number, spec in enumerate(specs.values(), start=1)]
    results = run_ranks(world_size, run_attempts, runs, str(folder))[0]
    for result in results:
        assert result.outcome.reason is ExitReason.COMPLETED, result.outcome
    return dict(zip(specs, results, strict=True))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Result]:
    specs: dict[Any, Any] = {
        (stage, precision): tiny_spec(zero={"stage": stage}, train={"precision": precision}, eval=EVAL)
        for stage in STAGES
        for precision in ("fp32", "bf16")
    }
    specs |= {(stage, "sgd"): tiny_spec(zero={"stage": stage}, optim=SGD) for stage in STAGES}
    specs |= {
        (stage, "checkpointing"): tiny_spec(zero={"stage": stage}, train={"activation_checkpointing": True})
        for stage in (0, 3)
    }
    specs["accumulated"] = tiny_spec(model=NO_DROPOUT, train={"micro_batch_size": 2})
    specs["not accumulated"] = tiny_spec(model=NO_DROPOUT, train={"micro_batch_size": 8})
    return train_all(2, specs, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Result]:
    specs: dict[Any, Any] = {stage: tiny_spec(zero={"stage": stage}) for stage in (0, 3)}
    specs["whole batch"] = tiny_spec(model=NO_DROPOUT, train={"micro_batch_size": 16})
    return train_all(1, specs, tmp_path_factory.mktemp("one"))


SGD: dict[str, Any] = {"name": "sgd", "lr": 0.05, "weight_decay": 0.01}


@pytest.mark.parametrize("variant", ["fp32", "bf16", "sgd"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_give_the_losses_of_stage_0(on_two: dict[Any, Result], stage: int, variant: str) -> None:
    assert on_two[stage, variant].losses == pytest.approx(on_two[0, variant].losses, abs=1e-5)
    norms, expected = (on_two[s, variant].metrics["train/grad_norm"] for s in (stage, 0))
    assert norms == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_evaluate_alike(on_two: dict[Any, Result], stage: int, precision: str) -> None:
    metrics, expected = on_two[stage, precision].metrics, on_two[0, precision].metrics
    assert list(metrics["eval/top1"]) == [3, 6]
    assert metrics["eval/top1"] == expected["eval/top1"]
    assert metrics["eval/loss"] == pytest.approx(expected["eval/loss"], abs=1e-5)


def test_losses_fall_and_variants_differ(on_two: dict[Any, Result]) -> None:
    """Or the comparisons above would compare nothing."""
    assert len(on_two[0, "fp32"].losses) == 6
    assert on_two[0, "fp32"].losses[-1] < on_two[0, "fp32"].losses[0] - 0.1
    for variant in ("bf16", "sgd"):
        assert on_two[0, variant].losses != pytest.approx(on_two[0, "fp32"].losses, abs=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_two_workers_give_the_losses_of_one_with_dropout(
    on_one: dict[Any, Result], on_two: dict[Any, Result], stage: int
) -> None:
    assert on_one[stage].losses == pytest.approx(on_two[stage, "fp32"].losses, abs=1e-5)


def test_accumulation_changes_nothing(on_one: dict[Any, Result], on_two: dict[Any, Result]) -> None:
    assert on_two["accumulated"].losses == pytest.approx(on_two["not accumulated"].losses, abs=1e-5)
    assert on_one["whole batch"].losses == pytest.approx(on_two["not accumulated"].losses, abs=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_changes_nothing(on_two: dict[Any, Result], stage: int) -> None:
    """Dropout masks are drawn again, the same, when a block is recomputed."""
    assert on_two[stage, "checkpointing"].losses == pytest.approx(on_two[0, "fp32"].losses, abs=1e-5)


def test_learning_rate_and_speed_are_reported(on_two: dict[Any, Result]) -> None:
    metrics = on_two[0, "fp32"].metrics
    assert list(metrics["train/lr"]) == [1, 2, 3, 4, 5, 6]
    assert metrics["train/lr"][1] == 0.0
    assert metrics["train/lr"][2] == pytest.approx(0.01)
    assert metrics["train/lr"][6] == pytest.approx(0.01 * 0.0954915, rel=1e-5)  # cosine, one step short of 0
    assert all(value > 0 for value in metrics["perf/images_per_s"].values())
    assert all(0 <= value <= 1 for value in metrics["perf/data_wait"].values())
    assert all(value > 0 for value in metrics["perf/mfu"].values())
    assert "perf/step_time_s/rank-00000" in metrics
