"""The optimizer as one kernel, as on GPUs; torch has it on the CPU, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import workers.engine
from configs.reasons import ExitReason
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Run, assert_same_bits, read_state, run_attempts
from workers.distributed import Ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]
OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    {"name": "sgd", "lr": 0.05, "weight_decay": 0.01},
]


def fused(ranks: Ranks, runs: list[Run], root: str) -> tuple[list[Any], list[bool]]:
    """`run_attempts` with the choice made for a GPU, and what the optimizers that were built said of it."""
    chosen: list[bool] = []
    build = workers.engine.build_optimizer

    def noted(*arguments: Any, **options: Any) -> Any:
        optimizer = build(*arguments, **options)
        chosen.append(bool(optimizer.defaults["fused"]))
        return optimizer

    workers.engine.is_fused, workers.engine.build_optimizer = lambda _: True, noted
    return run_attempts(ranks, runs, root), chosen


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda optim: optim["name"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_fused_run_resumes_exactly_with_the_losses_of_others(
    stage: int, optim: dict[str, Any], tmp_path: Path
) -> None:
    spec = tiny_spec(zero={"stage": stage}, optim=optim, checkpoint={"every_steps": 3})
    resumed = Run(make_attempt(spec, 2, 2, resume_from=saved_at(3, 1)))
    results, chosen = run_ranks(2, fused, [Run(make_attempt(spec, 2, 1)), resumed], str(tmp_path))[0]
    plain = run_ranks(2, run_attempts, [Run(make_attempt(spec, 2, 3))], str(tmp_path))[0][0]
    assert [result.outcome.reason for result in (*results, plain)] == [ExitReason.COMPLETED] * 3
    assert chosen == [True, True]
    assert results[0].losses == pytest.approx(plain.losses, abs=1e-5)
    (_, whole), (_, again) = (read_state(DirStore(tmp_path), saved_at(6, number).prefix) for number in (1, 2))
    assert_same_bits(whole, again)
