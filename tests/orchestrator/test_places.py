"""Places in the queue: shared while nothing changes, right as soon as something does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, select
from sqlalchemy.orm import Session

from configs.states import Desired
from orchestrator.control.launcher import ClusterStatus, NodeInfo
from orchestrator.control.queue_view import load_reservations, load_view, schedule_queue, store_cluster
from orchestrator.services.jobs import JobFilter, list_jobs, list_jobs_json
from orchestrator.services.places import BEFORE, NOT_LOOKED_AT, find_places
from orchestrator.storage.db import Database
from orchestrator.storage.tables import JobRow
from tests.orchestrator.rows import submit


def queue_of(api: TestClient, job_id: str) -> Any:
    return api.get(f"/v1/jobs/{job_id}").json()["queue"]


def test_a_new_job_knows_how_many_are_before_it(api: TestClient) -> None:
    first = submit(api)
    urgent = submit(api, queue__priority=90)
    last = submit(api)
    assert [job["queue"]["position"] for job in (first, urgent, last)] == [1, 1, 3]
    assert last["queue"] == {"position": 3, "reason": None, "message": NOT_LOOKED_AT, "eta_s": None}
    # Asked again, the reasons are there.
    assert queue_of(api, last["id"])["position"] == 3
    assert queue_of(api, last["id"])["reason"] == "CLUSTER_UNREACHABLE"


def test_who_is_before_a_new_job_is_counted_without_reading_rows(db: Database) -> None:
    statement = str(select(BEFORE).compile(dialect=db.engine.dialect))
    with db.engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", (50, 50, "2026-01-01")).all()
    assert any("COVERING INDEX ix_jobs_waiting (priority=? AND created_at<?)" in step[3] for step in plan), plan


def plans_of(db: Database, work: Callable[[Session], object]) -> list[str]:
    """How SQLite does what `work` asks of the jobs' table."""
    asked: list[tuple[str, Any]] = []

    def note(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
        asked.append((statement, parameters))

    event.listen(db.engine, "before_cursor_execute", note)
    with db.reader() as session:
        work(session)
    event.remove(db.engine, "before_cursor_execute", note)
    with db.engine.connect() as connection:
        steps = [connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values).all() for sql, values in asked]
    return [step[3] for plan in steps for step in plan if "jobs" in step[3] or "ORDER BY" in step[3]]


def test_what_is_done_all_the_time_does_not_read_all_jobs_that_ever_were(db: Database) -> None:
    """Without statistics SQLite takes an index of trials to be the way to the jobs that are none: all but a few."""
    for read in (list_jobs, list_jobs_json):
        newest = plans_of(db, lambda _, read=read: read(db, JobFilter(), 50, None))  # type: ignore[misc]
        assert newest[0] == "SCAN jobs USING INDEX ix_jobs_created"
        for wanted in (JobFilter(states=("SUCCEEDED", "FAILED")), JobFilter(kind="pretrain", project="p", name="n")):
            plan = plans_of(db, lambda _, read=read, wanted=wanted: read(db, wanted, 50, None))  # type: ignore[misc]
            assert plan[0] == "SCAN jobs USING COVERING INDEX ix_jobs_created"
            assert "USE TEMP B-TREE FOR ORDER BY" not in plan[1:2]
    held = plans_of(db, load_reservations)
    assert held
    assert all("ix_jobs_state_priority" in step for step in held), held
    seen = plans_of(db, lambda session: load_view(session, datetime.now(UTC)))
    assert all("ix_jobs_" in step and "search_id" not in step for step in seen), seen


@pytest.mark.db
def test_decisions_are_shared_while_the_queue_is_the_same(api: TestClient, db: Database) -> None:
    ids = [submit(api)["id"] for _ in range(3)]
    with db.reader() as session:
        first = find_places(session, ids)
        assert find_places(session, ids)[ids[2]] is first[ids[2]], "not decided again"
    api.post(f"/v1/jobs/{ids[0]}/cancel")
    with db.reader() as session:
        again = find_places(session, ids)
    assert [again.get(id_) and again[id_].position for id_ in ids] == [None, 1, 2]


@pytest.mark.db
def test_what_other_processes_change_is_seen_at_once(api: TestClient, db: Database) -> None:
    first, second = (submit(api)["id"] for _ in range(2))
    assert queue_of(api, second)["position"] == 2
    node = NodeInfo(id="n1", cpus=8.0)
    store_cluster(db, ClusterStatus(cluster_id="c", nodes=(node,)), "", datetime.now(UTC))
    assert queue_of(api, first)["message"].startswith("There is room")
    # The scheduler lets both go: they wait no more.
    schedule_queue(db, datetime.now(UTC))
    assert (queue_of(api, first), queue_of(api, second)) == (None, None)


def test_the_queue_is_looked_at_only_after_an_event(api: TestClient, db: Database) -> None:
    ids = [submit(api)["id"] for _ in range(2)]
    with db.reader() as session:
        find_places(session, ids, kept_s=600.0)

    def asked() -> list[str]:
        return plans_of(db, lambda session: find_places(session, ids, kept_s=600.0))

    assert asked() == [], "nothing was asked of the jobs"
    api.post(f"/v1/jobs/{ids[0]}/cancel")
    assert asked() != []
    assert asked() == []


def test_kept_places_grow_old(api: TestClient, db: Database) -> None:
    job_id = submit(api)["id"]
    with db.reader() as session:
        first = find_places(session, [job_id], kept_s=0.0)
        assert find_places(session, [job_id], kept_s=0.0)[job_id] is not first[job_id]
    with db.session() as session:
        session.get_one(JobRow, job_id).desired = Desired.PAUSE
    assert queue_of(api, job_id) is None
