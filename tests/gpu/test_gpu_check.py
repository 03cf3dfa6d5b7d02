"""The program that measures GPUs, gone through on the CPU: every check runs, and one that fails says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu import check
from workers.distributed import Ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]


def test_it_goes_through_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    code = check.main(["--device", "cpu", "--gpus", "1", "--models", "Ti/16", "--steps", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert code == 0, found
    assert found["passed"]
    assert set(found["checks"]) == {"parity", "resume", "nccl", "models"}
    assert found["checks"]["resume"]["exact"] == {f"zero{stage}": True for stage in range(4)}
    assert max(found["checks"]["parity"]["max_difference"].values()) < 1e-3
    runs = found["checks"]["models"]["runs"]
    assert [(run["zero_stage"], run["train"]) for run in runs] == [
        (1, {}),
        (1, {"activation_checkpointing": True}),
        (3, {}),
    ]
    assert all(run["images_per_s"] > 0 and run["planned_gib"] > 0 and run["peak_gib"] is None for run in runs)


def test_ranks_of_their_own_give_results_and_tell_failures() -> None:
    assert check.spawn_ranks(2, "cpu", _which) == [(0, 2), (1, 2)]
    with pytest.raises(RuntimeError, match="no such thing"):
        check.spawn_ranks(1, "cpu", _fail)


def _which(ranks: Ranks) -> tuple[int, int]:
    return ranks.rank, ranks.world_size


def _fail(_ranks: Ranks) -> None:
    raise ValueError("no such thing")
