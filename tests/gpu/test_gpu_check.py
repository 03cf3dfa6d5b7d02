"""The program that measures GPUs, gone through on the CPU: every check runs, and one that fails says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu import check
from tests.gpu.processes import spawn_ranks
from workers.distributed import Ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]


def test_it_goes_through_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    only = ["parity", "resume", "nccl", "saves", "models"]  # the jobs: tests/stack/test_gpu_check.py
    options = ["--device", "cpu", "--gpus", "1", "--models", "Ti/16", "--steps", "2", "--out", str(out)]
    code = check.main([*options, "--only", *only])
    found = json.loads(out.read_text())
    assert code == 0, found
    assert found["passed"]
    assert list(found["checks"]) == only
    assert {*only, "jobs"} == set(check.CHECKS)
    assert found["checks"]["resume"]["exact"] == {f"zero{stage}": True for stage in range(4)}
    assert max(found["checks"]["parity"]["max_difference"].values()) < 1e-3
    runs = found["checks"]["models"]["runs"]
    assert [(run["way"], run["zero_stage"]) for run in runs] == [
        ("bare torch", None),
        ("ours", 0),
        ("ours, activation checkpointing", 0),
        ("bare torch, timm's model", None),
    ]
    assert [run["to_bare"] is None for run in runs] == [True, False, False, True]
    saves = found["checks"]["saves"]
    assert set(saves["stall_s"]) == {"Patchwork", "plain copy", "torch async_save", "DeepSpeed save_checkpoint"}
    assert all(run["images_per_s"] > 0 and run["planned_gib"] > 0 and run["peak_gib"] is None for run in runs)


def test_ranks_of_their_own_give_results_and_tell_failures() -> None:
    assert spawn_ranks(2, "cpu", _which) == [(0, 2), (1, 2)]
    with pytest.raises(RuntimeError, match="no such thing"):
        spawn_ranks(1, "cpu", _fail)


def _which(ranks: Ranks) -> tuple[int, int]:
    return ranks.rank, ranks.world_size


def _fail(_ranks: Ranks) -> None:
    raise ValueError("no such thing")
