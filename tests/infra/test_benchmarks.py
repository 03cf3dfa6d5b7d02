"""What benchmarks share: their arithmetic, and that each of them can be started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.__main__ import main, programs
from tests.benchmarks.harness import Row, interleave, is_met, ratio, report


def test_the_ratio_is_taken_within_each_repetition() -> None:
    # A machine that is ten times slower in the second repetition says nothing of who is faster.
    ours = Row("ours", "s", [1.2, 12.0, 1.3], "theirs", ("at most", 1.25))
    rows = [ours, Row("theirs", "s", [1.0, 10.0, 1.0]), Row("theirs", "MB", [5.0])]
    assert ratio(ours, rows) == pytest.approx(1.2)
    assert is_met(ours, rows) is True
    assert ratio(rows[1], rows) is None
    slower = Row("ours", "s", [1.0, 10.0, 0.5], "theirs", ("at least", 1.01))
    assert is_met(slower, rows) is False


def test_contenders_take_turns_and_change_who_begins() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    values = interleave({"a": lambda: run("a"), "b": lambda: run("b")}, 3, is_quiet=True)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert values == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


def test_a_report_holds_every_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("ours", "s", [3.0, 1.0, 2.0], "theirs", ("at most", 0.5)), Row("theirs", "s", [2.0, 2.0, 2.0])]
    document = json.loads(report("some", "Some thing", rows, tmp_path).read_text())
    assert document["rows"][0] == {
        "name": "ours",
        "unit": "s",
        "median": 2.0,
        "values": [3.0, 1.0, 2.0],
        "opponent": "theirs",
        "ratio": 1.0,
        "goal": ["at most", 0.5],
        "is_met": False,
    }
    assert document["machine"]["cores"] >= 1
    assert "at most 0.5: not met" in capsys.readouterr().out


def test_an_unknown_benchmark_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"train_throughput", "start_latency", "save_stall", "comm_bytes", "search"} <= set(programs())
    assert "start_script" not in programs(), "it is run by start_latency"
    assert main(["save_stal", "--", "--repetitions", "1"]) == 2
    assert "benchmark 'save_stal', must be one of " in capsys.readouterr().err
