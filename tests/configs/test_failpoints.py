from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs.failpoints import VARIABLE, arm, failpoint

SCRIPT = """
import sys
from configs.failpoints import FailpointError, failpoint
for step in range(4):
    try:
        failpoint("loop.step", rank=1, step=step)
    except FailpointError:
        print("raised", step)
    print("passed", step)
"""


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    env = {VARIABLE: str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-u", "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=60)


def test_nothing_happens_without_a_folder() -> None:
    failpoint("loop.step", rank=0)


def test_a_kill_happens_where_all_conditions_hold_and_once_in_all_processes(tmp_path: Path) -> None:
    fired = arm(tmp_path, "loop.step", "kill rank=1 step=2")

    first, second = run(tmp_path), run(tmp_path)

    assert (first.returncode, first.stdout.split("\n")[-2]) == (-9, "passed 1")
    assert fired.exists()
    assert (second.returncode, second.stdout.split("\n")[-2]) == (0, "passed 3")


def test_always_repeats(tmp_path: Path) -> None:
    arm(tmp_path, "loop.step", "raise always rank=1")

    assert run(tmp_path).stdout.count("raised") == 4


def test_another_rank_is_spared(tmp_path: Path) -> None:
    fired = arm(tmp_path, "loop.step", "kill rank=0")

    assert run(tmp_path).returncode == 0
    assert not fired.exists()


@pytest.mark.parametrize("action", ["explode", "sleep=x"])
def test_an_unknown_action_is_an_error(tmp_path: Path, action: str) -> None:
    arm(tmp_path, "loop.step", action)

    assert "ValueError" in run(tmp_path).stderr
