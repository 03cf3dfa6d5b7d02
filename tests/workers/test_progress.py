"""The progress watchdog, on a clock of the test's own."""

from __future__ import annotations

from datetime import UTC, datetime

from configs.wire import Heartbeat, Phase
from workers.diagnosis import Hang
from workers.progress import SLOW, ProgressWatch

HANG_S, SILENT_S = 100.0, 30.0


def beat(rank: int, step: int, phase: Phase = "training", beats: int = 0) -> Heartbeat:
    return Heartbeat(
        rank=rank, node=f"n{rank}", pid=100 + rank, phase=phase, step=step, at=datetime.now(UTC), beats=beats
    )


def look(
    watch: ProgressWatch,
    now: float,
    *beats: Heartbeat,
    silent: dict[int, float] | None = None,
    ended: tuple[int, ...] = (),
) -> Hang | None:
    silent_s = {b.rank: 0.5 for b in beats} | (silent or {})
    return watch.observe(now, {b.rank: b for b in beats}, silent_s, ended)


def started() -> ProgressWatch:
    """Two ranks that have done some steps, the last at t = 10."""
    watch = ProgressWatch(HANG_S, SILENT_S)
    assert look(watch, 0.0, beat(0, 0), beat(1, 0)) is None
    assert look(watch, 10.0, beat(0, 5), beat(1, 5)) is None
    return watch


def test_moving_ranks_never_hang() -> None:
    watch = started()
    for second in range(11, 1000, 50):
        assert look(watch, second, beat(0, second), beat(1, second)) is None


def test_standing_still_names_the_rank_behind() -> None:
    watch = started()
    assert look(watch, 12.0, beat(0, 6), beat(1, 5)) is None
    assert look(watch, 111.0, beat(0, 6), beat(1, 5)) is None
    hang = look(watch, 113.0, beat(0, 6), beat(1, 5))
    assert hang is not None
    assert hang.rank == 1
    assert hang.suspects == (1,)
    assert "at step 5 (training); the other ranks stand at step 6" in hang.message


def test_where_all_stand_at_one_step_all_are_suspects() -> None:
    hang = look(started(), 200.0, beat(0, 5), beat(1, 5))
    assert hang is not None
    assert hang.suspects == (0, 1)
    assert hang.message == "No rank made progress for 190 s; ranks [0, 1] stand at step 5 (training)."


def test_one_moving_rank_is_enough() -> None:
    watch = started()
    for now in range(20, 400, 20):
        assert look(watch, float(now), beat(0, 5 + now), beat(1, 5)) is None


def test_beats_within_a_long_evaluation_count() -> None:
    watch = started()
    for now in range(20, 800, 40):
        assert look(watch, float(now), beat(0, 5, "evaluating", now), beat(1, 5, "evaluating", now)) is None


def test_slow_phases_and_the_first_step_get_more_time() -> None:
    for phase, step in (("building", 0), ("loading", 0), ("training", 0), ("saving", 5)):
        watch = ProgressWatch(HANG_S, SILENT_S)
        assert look(watch, 0.0, beat(0, step, phase)) is None
        assert look(watch, HANG_S * SLOW - 1, beat(0, step, phase)) is None
        assert look(watch, HANG_S * SLOW + 1, beat(0, step, phase)) is not None


def test_a_silent_rank_is_named_while_others_speak() -> None:
    watch = started()
    assert look(watch, 30.0, beat(0, 6), beat(1, 5), silent={1: 29.0}) is None
    hang = look(watch, 32.0, beat(0, 6), beat(1, 5), silent={1: 31.0})
    assert hang is not None
    assert hang.rank == 1
    assert "process 101" in hang.message


def test_when_all_are_silent_nobody_is_named_yet() -> None:
    assert look(started(), 60.0, beat(0, 5), beat(1, 5), silent={0: 40.0, 1: 45.0}) is None


def test_ended_ranks_are_not_watched() -> None:
    watch = started()
    assert look(watch, 500.0, beat(0, 5), beat(1, 5), ended=(0, 1)) is None
    assert look(watch, 500.0, beat(0, 5), beat(1, 5), silent={0: 400.0}, ended=(0,)) is not None  # rank 1 stands still
