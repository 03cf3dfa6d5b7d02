from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from sqlalchemy import select

from configs.states import Desired, JobState
from orchestrator.control.transitions import (
    TRANSITIONS,
    IllegalTransition,
    JobEvent,
    allowed_actions,
    enqueue,
    successors,
    transition,
)
from orchestrator.storage.db import Database
from orchestrator.storage.events import record
from orchestrator.storage.tables import EventRow, JobRow
from tests.factories import NOW, add_job, make_job

LEGAL = {(origin, to) for (origin, _), to in TRANSITIONS.items()}


@pytest.mark.parametrize(("origin", "to"), list(product(JobState, JobState)))
def test_every_pair_of_states_is_as_the_table_says(db: Database, origin: JobState, to: JobState) -> None:
    job = add_job(db)
    with db.session() as session:
        session.get_one(JobRow, job.id).state = origin
    if (origin, to) in LEGAL:
        with db.session() as session:
            row = session.get_one(JobRow, job.id)
            transition(session, row, to, reason="R", message="m", actor="tester", attempt=3, at=NOW)
        with db.reader() as session:
            row = session.get_one(JobRow, job.id)
            event = session.scalars(select(EventRow).order_by(EventRow.seq.desc()).limit(1)).one()
        assert (row.state, row.reason, row.message, row.state_since, row.version) == (to, "R", "m", NOW, 2)
        assert (event.type, event.actor, event.attempt) == (f"job.{to.lower()}", "tester", 3)
        assert event.data == {"from": origin, "to": to, "reason": "R"}
        assert (row.ended_at is not None) == to.is_terminal
    else:
        with pytest.raises(IllegalTransition, match=f"{origin} to {to}"), db.session() as session:
            transition(session, session.get_one(JobRow, job.id), to, actor="tester")
        with db.reader() as session:
            assert session.get_one(JobRow, job.id).state == origin
            assert len(session.scalars(select(EventRow)).all()) == 1


@pytest.mark.parametrize("state", list(JobState))
def test_only_ends_are_final(state: JobState) -> None:
    assert (not successors(state)) == state.is_terminal


def test_every_event_and_every_state_is_used() -> None:
    assert {event for _, event in TRANSITIONS} == set(JobEvent)
    assert set(TRANSITIONS.values()) == set(JobState)


def test_every_live_state_can_end_and_can_be_cancelled() -> None:
    for state in JobState:
        if state.holds_resources:
            assert {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED} <= successors(state)


def test_started_at_is_that_of_the_first_launch(db: Database) -> None:
    job = add_job(db)
    with db.session() as session:
        row = session.get_one(JobRow, job.id)
        transition(session, row, JobState.PREPARING, actor="t", at=NOW)
        transition(session, row, JobState.QUEUED, actor="t")
        transition(session, row, JobState.PREPARING, actor="t")
        assert row.started_at == NOW


@pytest.mark.parametrize("to", [JobState.QUEUED, JobState.CANCELLED])
def test_a_go_ahead_does_not_outlive_the_launch(db: Database, to: JobState) -> None:
    job = add_job(db)
    with db.session() as session:
        row = session.get_one(JobRow, job.id)
        row.start_workers = 2
        transition(session, row, JobState.PREPARING, actor="t")
        assert row.start_workers == 2
        transition(session, row, to, actor="t")
        assert row.start_workers is None


def test_enqueue_rolls_back_with_its_event(db: Database) -> None:
    job = make_job()
    job_id = job.id

    def interrupted() -> None:
        with db.session() as session:
            enqueue(session, job, actor="ann")
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError):
        interrupted()
    with db.reader() as session:
        assert session.get(JobRow, job_id) is None
        assert session.scalars(select(EventRow)).all() == []


@pytest.mark.db
def test_events_of_a_job_are_numbered_in_the_order_of_their_commits(db: Database) -> None:
    """A reader who follows by `seq` must never see a later event before an earlier one is committed."""
    job = add_job(db)
    first_recorded, second_tries = threading.Event(), threading.Event()

    def first() -> int:
        with db.session() as session:
            seq = record(session, job.id, "a", "", "t").seq
            first_recorded.set()
            assert second_tries.wait(10)
            # The second one is at the job's row now, or soon is; it cannot have a number before we commit.
            assert not second_done.wait(0.2)
            return seq

    second_done = threading.Event()

    def second() -> int:
        assert first_recorded.wait(10)
        second_tries.set()
        with db.session() as session:
            seq = record(session, job.id, "b", "", "t").seq
            second_done.set()
            return seq

    with ThreadPoolExecutor(2) as pool:
        a, b = pool.submit(first), pool.submit(second)
        assert a.result(30) < b.result(30)


@pytest.mark.parametrize(
    ("state", "desired", "kind", "expected"),
    [
        (JobState.QUEUED, Desired.RUN, "evaluate", ["cancel", "pause"]),
        (JobState.RUNNING, Desired.RUN, "pretrain", ["cancel", "pause"]),
        (JobState.RUNNING, Desired.RUN, "evaluate", ["cancel"]),
        (JobState.RUNNING, Desired.PAUSE, "pretrain", ["cancel", "resume"]),
        (JobState.PAUSING, Desired.PAUSE, "pretrain", ["cancel", "resume"]),
        (JobState.PAUSED, Desired.PAUSE, "pretrain", ["cancel", "resume"]),
        (JobState.RUNNING, Desired.STOP, "pretrain", []),
        (JobState.STOPPING, Desired.STOP, "pretrain", []),
        (JobState.FAILED, Desired.RUN, "pretrain", ["retry"]),
        (JobState.CANCELLED, Desired.STOP, "pretrain", ["retry"]),
        (JobState.SUCCEEDED, Desired.RUN, "pretrain", []),
    ],
)
def test_allowed_actions(state: JobState, desired: Desired, kind: str, expected: list[str]) -> None:
    assert allowed_actions(make_job(state=state, desired=desired, kind=kind)) == expected
