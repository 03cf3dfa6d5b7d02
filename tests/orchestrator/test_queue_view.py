from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from configs.reasons import QueueReason
from configs.states import AttemptState, Desired, JobState
from orchestrator.control.launcher import ClusterStatus, NodeInfo
from orchestrator.control.queue_view import beat, load_view, needs, schedule_queue, store_cluster
from orchestrator.control.retries import at_rest
from orchestrator.control.scheduling import Reservation, Worker
from orchestrator.storage.db import Database
from orchestrator.storage.tables import ClusterRow, EventRow, JobRow
from tests.factories import NOW, add_job, make_attempt, make_job, make_spec

pytestmark = pytest.mark.db
ONE_NODE = ClusterStatus(cluster_id="session_1", nodes=(NodeInfo(id="n1", host="h1", cpus=4),))


def spec(workers: Any = 2, **sections: Any) -> dict[str, Any]:
    resources = {"workers": workers, "gpus_per_worker": 0, "cpus_per_worker": 1}
    return make_spec(**({"resources": resources, "train": {"global_batch_size": 72}} | sections))


def change(db: Database, job_id: str, **fields: Any) -> None:
    with db.session() as session:
        row = session.get_one(JobRow, job_id)
        for name, value in fields.items():
            setattr(row, name, value)


def get(db: Database, job_id: str) -> JobRow:
    with db.reader() as session:
        return session.get_one(JobRow, job_id)


def events(db: Database, job_id: str) -> list[str]:
    with db.reader() as session:
        return list(session.scalars(select(EventRow.type).where(EventRow.job_id == job_id).order_by(EventRow.seq)))


def test_world_sizes_are_those_that_divide_the_batch() -> None:
    elastic = make_job(spec({"min": 1, "max": 5}))
    assert needs(elastic.spec_json).world_sizes == (1, 2, 3, 4)
    evaluation = make_job({"kind": "evaluate", "resources": {"workers": {"min": 1, "max": 3}, "gpus_per_worker": 1}})
    assert needs(evaluation.spec_json) == (Worker(1, 1), (1, 2, 3), (), 1)


def test_start_and_wait_are_written_down(db: Database) -> None:
    store_cluster(db, ONE_NODE, "", NOW)
    first, second = add_job(db, spec(3)), add_job(db, spec(2))
    assert schedule_queue(db, NOW) == 1
    assert get(db, first.id).start_workers == 3
    waiting = get(db, second.id)
    assert (waiting.start_workers, waiting.reason) == (None, QueueReason.WAITING_FOR_WORKERS)
    assert waiting.message == "Needs 2 workers with 1 CPU each; 1 such are free."
    assert schedule_queue(db, NOW) == 0
    assert events(db, second.id) == ["job.queued", "job.waiting"]


def test_a_reason_that_changes_is_an_event_a_message_is_not(db: Database) -> None:
    job = add_job(db, spec(9))
    schedule_queue(db, NOW)
    assert get(db, job.id).reason == QueueReason.CLUSTER_UNREACHABLE
    store_cluster(db, ONE_NODE, "", NOW)
    schedule_queue(db, NOW)
    smaller = ClusterStatus(cluster_id="session_1", nodes=(NodeInfo(id="n1", cpus=2),))
    store_cluster(db, smaller, "", NOW)
    schedule_queue(db, NOW)
    row = get(db, job.id)
    assert (row.reason, row.message) == (
        QueueReason.EXCEEDS_CLUSTER,
        "Needs 9 workers with 1 CPU each; the whole cluster holds 2 such workers.",
    )
    assert events(db, job.id).count("job.waiting") == 2
    assert row.version == 1, "the ETag is for what users and states change"


def test_jobs_that_are_not_wanted_to_run_are_not_scheduled(db: Database) -> None:
    store_cluster(db, ONE_NODE, "", NOW)
    for desired in (Desired.STOP, Desired.PAUSE):
        change(db, add_job(db, spec(1)).id, desired=desired)
    assert schedule_queue(db, NOW) == 0


def test_priority_edited_while_queued_counts(db: Database) -> None:
    store_cluster(db, ONE_NODE, "", NOW)
    add_job(db, spec(4))
    urgent = add_job(db, spec(4))
    change(db, urgent.id, priority=90)
    schedule_queue(db, NOW)
    assert get(db, urgent.id).start_workers == 4


def test_a_job_that_cannot_be_understood_does_not_stop_the_line(db: Database) -> None:
    store_cluster(db, ONE_NODE, "", NOW)
    indivisible = add_job(db, spec(5))
    for broken in (b"not json", b'{"resources": {"workers": "many"}}'):
        change(db, add_job(db, spec(1)).id, spec_json=broken)
    good = add_job(db, spec(2))
    schedule_queue(db, NOW)
    assert get(db, good.id).start_workers == 2
    assert get(db, indivisible.id).reason == QueueReason.PLACEMENT_IMPOSSIBLE


def test_what_live_jobs_hold_is_reserved(db: Database) -> None:
    store_cluster(db, ONE_NODE, "", NOW)
    running, recovering, promised, over = (add_job(db, spec(2)) for _ in range(4))
    with db.session() as session:
        ranks = {"0": {"node": "n1"}, "1": {"node": "n1"}}
        session.add(make_attempt(running, 1, world_size=2, ranks=ranks))
        session.add(make_attempt(recovering, 1, world_size=4, state=AttemptState.ENDED, ranks=ranks))
        session.add(make_attempt(over, 1, world_size=2, state=AttemptState.ENDED))
    change(db, running.id, state=JobState.RUNNING)
    change(db, recovering.id, state=JobState.RECOVERING)
    change(db, promised.id, start_workers=1)
    change(db, over.id, state=JobState.SUCCEEDED)
    with db.reader() as session:
        view = load_view(session, NOW)
    cpu = Worker(1)
    assert sorted(view.reserved, key=lambda r: r.world_size) == [
        Reservation(promised.id, 1, cpu),
        Reservation(running.id, 2, cpu, ("n1", "n1")),
        Reservation(recovering.id, 4, cpu),
    ]
    assert view.waiting == ()


def test_dependencies_wait_for_success(db: Database) -> None:
    store_cluster(db, ONE_NODE, "", NOW)
    first = add_job(db, spec(1))
    second = add_job(db, spec(1, queue={"depends_on": [first.id, "job_that_is_unknown"]}))
    third = add_job(db, spec(1, queue={"depends_on": [first.id]}))
    schedule_queue(db, NOW)
    assert get(db, third.id).reason == QueueReason.DEPENDENCY
    assert first.id in get(db, third.id).message
    change(db, first.id, state=JobState.SUCCEEDED)
    schedule_queue(db, NOW)
    assert get(db, third.id).start_workers == 1
    assert get(db, second.id).message == "Waits for job_that_is_unknown (unknown)."


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_a_job_whose_dependency_ended_without_success_is_asked_to_end(db: Database, state: JobState) -> None:
    store_cluster(db, ONE_NODE, "", NOW)
    first = add_job(db, spec(1))
    change(db, first.id, state=state)
    second = add_job(db, spec(1, queue={"depends_on": [first.id]}))
    schedule_queue(db, NOW)
    schedule_queue(db, NOW)
    waiting = get(db, second.id)
    assert (waiting.state, waiting.desired, waiting.start_workers) == (JobState.QUEUED, Desired.STOP, None)
    assert (waiting.reason, waiting.message) == ("DEPENDENCY_FAILED", f"Depends on {first.id} ({state}).")
    assert events(db, second.id) == ["job.queued", "job.dependency_failed"]
    following = at_rest(waiting)
    assert (following.state, following.reason, following.message) == (
        JobState.CANCELLED,
        "DEPENDENCY_FAILED",
        waiting.message,
    )


def test_a_cluster_that_goes_away_keeps_its_nodes_to_show(db: Database) -> None:
    beat(db, NOW)
    store_cluster(db, ONE_NODE, "", NOW)
    store_cluster(db, None, "connection refused", NOW)
    with db.reader() as session:
        row = session.get_one(ClusterRow, 1)
        view = load_view(session, NOW)
    assert (row.reachable, row.message, row.cluster_id, len(row.nodes)) == (False, "connection refused", "session_1", 1)
    assert row.controller_at == NOW
    assert view.nodes is None
