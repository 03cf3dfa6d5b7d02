"""What a driver did not deliver is taken from its attempt's checkpoints."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from configs.ids import attempt_id
from configs.layout import checkpoint_prefix, manifest_key, rank_files_key
from configs.wire import MAX_POINTS, MetricColumns, MetricPoint, RankFiles, ReportBatch, to_columns
from orchestrator.control.leases import LeaseLost
from orchestrator.control.measured import recover_measured
from orchestrator.services.reports import ingest_report
from orchestrator.storage.arrivals import BEFORE_ALL, read_arrivals
from orchestrator.storage.db import Database
from orchestrator.storage.registry import delete_checkpoint, register_manifests
from orchestrator.storage.tables import AttemptRow, JobRow, MetricRow
from tests.factories import add_job, make_attempt, put_checkpoint
from tests.fakes.memory_store import MemoryStore

AT = datetime(2026, 1, 1, tzinfo=UTC)


def columns(name: str, values: dict[int, float]) -> tuple[MetricColumns, ...]:
    return to_columns(MetricPoint(name=name, step=step, value=value, at=AT) for step, value in values.items())


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def job(db: Database) -> JobRow:
    """With one attempt on two workers."""
    job = add_job(db)
    with db.session() as session:
        session.add(make_attempt(job, 1, world_size=2))
        session.get_one(JobRow, job.id).num_attempts = 1
    return job


def commit(store: MemoryStore, db: Database, job: JobRow, step: int, *measured: tuple[MetricColumns, ...]) -> None:
    """A checkpoint with what each rank measured before it."""
    put_checkpoint(store, job, 1, step)
    for rank, points in enumerate(measured):
        record = RankFiles(rank=rank, files=(), measured=points)
        key = rank_files_key(checkpoint_prefix(job.id, step, 1), rank, len(measured))
        store.put(key, record.model_dump_json().encode())
    register_manifests(db, store, job.id)


def stored(db: Database, job: JobRow) -> dict[tuple[str, int], float | None]:
    with db.reader() as session:
        rows = session.execute(
            select(MetricRow.name, MetricRow.step, MetricRow.value).where(MetricRow.job_id == job.id)
        )
        return {(name, step): value for name, step, value in rows}


def recover(db: Database, store: MemoryStore, job: JobRow) -> int:
    return recover_measured(db, store, attempt_id(job.id, 1), guard=lambda _: None)


@pytest.mark.db
def test_what_was_not_delivered_is_found_and_what_was_stays(db: Database, store: MemoryStore, job: JobRow) -> None:
    first = ReportBatch(seq=1, columns=columns("train/loss", {10: 2.5, 20: 2.25}))
    ingest_report(db, attempt_id(job.id, 1), first)
    commit(store, db, job, 20, columns("train/loss", {10: 9.0, 20: 9.0}), columns("perf/step_s", {20: 0.5}))
    commit(store, db, job, 40, columns("train/loss", {30: 2.0, 40: 1.75}), columns("perf/step_s", {40: 0.25}))
    with db.reader() as session:
        before, _ = read_arrivals(session, job.id, BEFORE_ALL, last_attempt=1)

    assert recover(db, store, job) == 6
    assert stored(db, job) == {
        ("train/loss", 10): 2.5,
        ("train/loss", 20): 2.25,
        ("train/loss", 30): 2.0,
        ("train/loss", 40): 1.75,
        ("perf/step_s", 20): 0.5,
        ("perf/step_s", 40): 0.25,
    }
    with db.reader() as session:
        assert session.get_one(JobRow, job.id).last_metrics == {"train/loss": 1.75, "perf/step_s": 0.25}
        # Who passes points on in the order of their arrival, and was up to date, finds these and no others.
        after, _ = read_arrivals(session, job.id, before[-1].place, last_attempt=1)
    assert {(point.name, point.step) for point in after} == stored(db, job).keys() - {(p.name, p.step) for p in before}
    assert recover(db, store, job) == 0, "once is enough"


@pytest.mark.db
def test_nothing_is_read_where_the_last_report_arrived(db: Database, store: MemoryStore, job: JobRow) -> None:
    commit(store, db, job, 20, columns("train/loss", {20: 1.0}), ())
    ingest_report(db, attempt_id(job.id, 1), ReportBatch(seq=1, finished=True))
    store.delete([item.key for item in store.list("")])
    assert recover(db, store, job) == 0
    assert stored(db, job) == {}


def test_records_that_cannot_be_read_do_not_hold_up_the_others(db: Database, store: MemoryStore, job: JobRow) -> None:
    commit(store, db, job, 20, columns("train/loss", {20: 1.0}), columns("perf/step_s", {20: 0.5}))
    commit(store, db, job, 40, columns("train/loss", {40: 0.5}), ())
    store.put(rank_files_key(checkpoint_prefix(job.id, 20, 1), 0, 2), b'{"rank": 0, "fil')
    store.delete([rank_files_key(checkpoint_prefix(job.id, 40, 1), 1, 2)])
    assert recover(db, store, job) == 2
    assert stored(db, job) == {("perf/step_s", 20): 0.5, ("train/loss", 40): 0.5}


def test_a_checkpoint_that_is_gone_is_passed_over(db: Database, store: MemoryStore, job: JobRow) -> None:
    commit(store, db, job, 20, columns("train/loss", {20: 1.0}), ())
    delete_checkpoint(store, checkpoint_prefix(job.id, 20, 1))
    assert recover(db, store, job) == 0
    with db.reader() as session:
        assert not session.get_one(AttemptRow, attempt_id(job.id, 1)).reported


@pytest.mark.db
def test_more_points_than_a_report_may_hold(db: Database, store: MemoryStore, job: JobRow) -> None:
    many = {step: float(step) for step in range(MAX_POINTS + 5)}
    commit(store, db, job, 20, columns("train/loss", many), columns("perf/step_s", {20: 0.5}))
    assert recover(db, store, job) == MAX_POINTS + 6
    assert len(stored(db, job)) == MAX_POINTS + 6
    with db.reader() as session:
        sizes: dict[int, int] = {}
        for row in session.scalars(select(MetricRow).where(MetricRow.job_id == job.id)):
            sizes[row.seq] = sizes.get(row.seq, 0) + 1
    assert max(sizes.values()) <= MAX_POINTS
    assert len(sizes) == 2


def test_who_lost_the_lease_writes_nothing(db: Database, store: MemoryStore, job: JobRow) -> None:
    commit(store, db, job, 20, columns("train/loss", {20: 1.0}), ())

    def guard(_: Session) -> None:
        raise LeaseLost("another process took over")

    with pytest.raises(LeaseLost):
        recover_measured(db, store, attempt_id(job.id, 1), guard=guard)
    assert stored(db, job) == {}
    assert manifest_key(checkpoint_prefix(job.id, 20, 1)) in {item.key for item in store.list("")}
