"""Whether a GPU computes what a CPU does, and the same again after a resume."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from configs.reasons import ExitReason
from tests.fakes.dir_store import DirStore
from tests.gpu.processes import on_ranks
from tests.workers.attempts import make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Run, read_state, run_attempts
from workers.distributed import Ranks

STAGES = (0, 1, 2, 3)
FP32_TOLERANCE = 2e-4
BF16_TOLERANCE = 3e-2


def check_parity(world_size: int, device: str) -> dict[str, Any]:
    """Losses of six steps with dropout off, whose masks differ between devices."""
    found: dict[str, Any] = {"max_difference": {}, "tolerance": {"fp32": FP32_TOLERANCE, "bf16": BF16_TOLERANCE}}
    passed = True
    for precision, tolerance in (("fp32", FP32_TOLERANCE), ("bf16", BF16_TOLERANCE)):
        parts = {"model": {"dropout": 0.0, "drop_path": 0.0}, "train": {"precision": precision}}
        specs = [tiny_spec(zero={"stage": stage}, **parts) for stage in STAGES]
        runs = [Run(make_attempt(spec, world_size, number)) for number, spec in enumerate(specs, 1)]
        losses = _losses(on_ranks(world_size, device, run_attempts, runs, tempfile.mkdtemp())[0])
        (on_cpu,) = _losses(on_ranks(1, "cpu", run_attempts, [Run(make_attempt(specs[0], 1))], tempfile.mkdtemp())[0])
        for stage, of_stage in zip(STAGES, losses, strict=True):
            difference = max(abs(a - b) for a, b in zip(of_stage, on_cpu, strict=True))
            found["max_difference"][f"{precision}/zero{stage}"] = difference
            passed &= difference <= tolerance
    return found | {"passed": passed}


def _losses(results: list[Any]) -> list[list[float]]:
    failed = [result.outcome for result in results if result.outcome.reason is not ExitReason.COMPLETED]
    if failed:
        raise RuntimeError(f"a run did not complete: {failed[0]}")
    return [result.losses for result in results]


def check_resume(world_size: int, device: str) -> dict[str, Any]:
    """Whole, and again from its third step: weights and moments bit for bit."""
    root = tempfile.mkdtemp()
    runs = []
    for stage in STAGES:
        spec = tiny_spec(zero={"stage": stage}, checkpoint={"every_steps": 3}, train={"precision": "bf16"})
        first, second = 2 * stage + 1, 2 * stage + 2
        resumed = make_attempt(spec, world_size, second, resume_from=saved_at(3, first))
        runs += [Run(make_attempt(spec, world_size, first)), Run(resumed)]
    _losses(on_ranks(world_size, device, deterministic, runs, root)[0])
    exact: dict[str, bool] = {}
    for stage in STAGES:
        both = (2 * stage + 1, 2 * stage + 2)
        (_, whole), (_, again) = (read_state(DirStore(root), saved_at(6, number).prefix) for number in both)
        exact[f"zero{stage}"] = all(torch.equal(whole[key], again[key]) for key in whole)
    return {"exact": exact, "passed": all(exact.values())}


def deterministic(ranks: Ranks, runs: list[Run], root: str) -> list[Any]:
    """`run_attempts` with kernels whose sums have one order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    return run_attempts(ranks, runs, root)
