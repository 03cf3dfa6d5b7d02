from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import delete, select

from configs.ids import attempt_id, checkpoint_id, new_job_id
from configs.layout import attempt_key, checkpoint_prefix, manifest_key
from configs.states import AttemptState, JobState
from configs.wire import AttemptFile, ParentCut
from orchestrator.storage.db import Database
from orchestrator.storage.registry import (
    Keep,
    apply_retention,
    best_checkpoint,
    invalidate,
    is_complete,
    newest_checkpoint,
    record_committed,
    register_manifests,
    resolve_ref,
    superfluous,
    sweep,
)
from orchestrator.storage.store import StoreUnavailable
from orchestrator.storage.tables import CheckpointRow, EventRow, JobRow
from tests.factories import NOW, add_job, make_attempt, make_spec, put_checkpoint
from tests.fakes.memory_store import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def job(db: Database) -> JobRow:
    return add_job(db)


def put_attempt_file(store: MemoryStore, job: JobRow, number: int, *parents: tuple[int, int]) -> None:
    file = AttemptFile(
        job_id=job.id,
        attempt_id=attempt_id(job.id, number),
        number=number,
        spec={},
        spec_hash="",
        training_fingerprint="",
        world_size=2,
        parents=tuple(ParentCut(attempt=a, step=s) for a, s in parents),
        created_at=NOW,
    )
    store.put(attempt_key(file.attempt_id), file.model_dump_json().encode())


def steps(db: Database, job: JobRow, *, valid: bool | None = None) -> list[int]:
    """Steps of the rows whose objects are not deleted."""
    query = select(CheckpointRow.step).where(CheckpointRow.job_id == job.id, CheckpointRow.deleted_at.is_(None))
    if valid is not None:
        query = query.where(CheckpointRow.valid.is_(valid))
    with db.reader() as session:
        return list(session.scalars(query.order_by(CheckpointRow.step)))


def add_attempt(db: Database, job: JobRow, number: int, **fields: Any) -> None:
    with db.session() as session:
        session.add(make_attempt(job, number, **fields))


# -- registering ----------------------------------------------------------------------
@pytest.mark.db
def test_manifests_become_rows_once(db: Database, store: MemoryStore, job: JobRow) -> None:
    id_ = put_checkpoint(store, job, 1, 100, metrics={"eval/top1": 0.5})
    assert register_manifests(db, store, job.id) == [id_]
    assert register_manifests(db, store, job.id) == []
    with db.reader() as session:
        row = session.get_one(CheckpointRow, id_)
        events = [event.type for event in session.scalars(select(EventRow).order_by(EventRow.seq))]
    assert (row.attempt, row.step, row.num_bytes, row.metrics) == (1, 100, 4, {"eval/top1": 0.5})
    assert row.prefix == checkpoint_prefix(job.id, 100, 1)
    assert events == ["job.queued", "checkpoint.committed"]


@pytest.mark.db
@pytest.mark.parametrize("reported_first", [True, False])
def test_a_checkpoint_is_said_once(db: Database, store: MemoryStore, job: JobRow, reported_first: bool) -> None:
    id_ = put_checkpoint(store, job, 1, 100)

    def report() -> None:
        with db.session() as session:
            record_committed(session, job.id, 1, id_, "att_1")

    steps_ = [report, lambda: register_manifests(db, store, job.id)]
    for step in steps_ if reported_first else reversed(steps_):
        step()
    with db.reader() as session:
        events = [(event.type, event.actor) for event in session.scalars(select(EventRow).order_by(EventRow.seq))]
    assert events[1:] == [("checkpoint.committed", "att_1" if reported_first else "reconciler")]


def test_who_may_not_act_for_the_job_any_more_registers_nothing(db: Database, store: MemoryStore, job: JobRow) -> None:
    put_checkpoint(store, job, 1, 100)

    def refuse(_: object) -> None:
        raise PermissionError

    with pytest.raises(PermissionError):
        register_manifests(db, store, job.id, guard=refuse)
    assert steps(db, job) == []


def test_without_a_manifest_there_is_no_checkpoint(db: Database, store: MemoryStore, job: JobRow) -> None:
    id_ = put_checkpoint(store, job, 1, 100)
    store.delete([manifest_key(checkpoint_prefix(job.id, 100, 1))])
    assert register_manifests(db, store, job.id) == []
    put_checkpoint(store, job, 1, 100)
    assert register_manifests(db, store, job.id) == [id_]


def test_torn_and_foreign_manifests_are_ignored(db: Database, store: MemoryStore, job: JobRow) -> None:
    good = put_checkpoint(store, job, 1, 100)
    put_checkpoint(store, job, 1, 200)
    torn = manifest_key(checkpoint_prefix(job.id, 200, 1))
    store.objects[torn] = store.objects[torn][:-20]
    put_checkpoint(store, job, 1, 300, training_fingerprint="sha256:another")
    put_checkpoint(store, job, 1, 400, job_id=new_job_id())
    store.put(f"{checkpoint_prefix(job.id, 500, 1)[:-1]}-copy/manifest.json", b"{}")
    assert register_manifests(db, store, job.id) == [good]


def test_what_a_zombie_commits_late_is_not_counted(db: Database, store: MemoryStore, job: JobRow) -> None:
    """Attempt 2 continued from step 100 of attempt 1; attempt 1 lived on and committed step 200."""
    put_checkpoint(store, job, 1, 100)
    put_attempt_file(store, job, 1)
    put_attempt_file(store, job, 2, (1, 100))
    register_manifests(db, store, job.id)
    put_checkpoint(store, job, 1, 200)
    put_checkpoint(store, job, 2, 150)
    register_manifests(db, store, job.id)
    assert steps(db, job, valid=True) == [100, 150]
    assert steps(db, job, valid=False) == [200]
    with db.reader() as session:
        newest = newest_checkpoint(session, job.id)
        (ignored,) = session.scalars(select(EventRow).where(EventRow.type == "checkpoint.ignored"))
    assert newest is not None
    assert newest.id == checkpoint_id(job.id, 150, 2)
    late = checkpoint_id(job.id, 200, 1)
    assert ignored.message == (
        f"Checkpoint {late} was committed after another attempt had taken over from attempt 1: it does not count"
    )


def test_the_registry_comes_back_from_the_bucket_alone(db: Database, store: MemoryStore, job: JobRow) -> None:
    put_attempt_file(store, job, 1)
    put_attempt_file(store, job, 2, (1, 100))
    for attempt, step in ((1, 100), (1, 200), (2, 150)):
        put_checkpoint(store, job, attempt, step, metrics={"eval/top1": step / 1000})

    def rows() -> list[tuple[object, ...]]:
        with db.reader() as session:
            query = select(CheckpointRow.id, CheckpointRow.prefix, CheckpointRow.metrics, CheckpointRow.valid)
            return [tuple(row) for row in session.execute(query.order_by(CheckpointRow.id))]

    register_manifests(db, store, job.id)
    before = rows()
    with db.session() as session:
        session.execute(delete(CheckpointRow))
    register_manifests(db, store, job.id)
    assert rows() == before
    assert len(before) == 3


def test_a_store_that_is_away_changes_nothing(db: Database, store: MemoryStore, job: JobRow) -> None:
    put_checkpoint(store, job, 1, 100)
    store.fail_next = 1
    with pytest.raises(StoreUnavailable):
        register_manifests(db, store, job.id)
    assert steps(db, job) == []


def test_completeness_is_seen_from_names_and_sizes(store: MemoryStore, job: JobRow) -> None:
    put_checkpoint(store, job, 1, 100)
    prefix = checkpoint_prefix(job.id, 100, 1)
    shard = f"{prefix}shards/weights-00000-of-00001.safetensors"
    assert is_complete(store, prefix)
    store.put(shard, b"123")
    assert not is_complete(store, prefix)
    store.delete([shard])
    assert not is_complete(store, prefix)
    assert not is_complete(store, checkpoint_prefix(job.id, 999, 1))


# -- references ----------------------------------------------------------------------
def test_best_latest_and_by_id(db: Database, store: MemoryStore, job: JobRow) -> None:
    for step, top1 in ((100, 0.9), (200, 0.7), (300, 0.9), (400, None)):
        put_checkpoint(store, job, 1, step, metrics={} if top1 is None else {"eval/top1": top1})
    register_manifests(db, store, job.id)

    def step_of(ref: str) -> int | None:
        with db.session() as session:
            row = resolve_ref(session, ref, hold=True)
            return row.step if row is not None else None

    assert step_of(f"{job.id}/best") == 300  # of equals the later one
    assert step_of(f"{job.id}/latest") == 400
    assert step_of(checkpoint_id(job.id, 200, 1)) == 200
    assert step_of(checkpoint_id(job.id, 999, 1)) is None
    assert step_of("job_01ARZ3NDEKTSV4RRFFQ69G5FAV/best") is None
    with db.session() as session:
        invalidate(session, job.id, checkpoint_id(job.id, 400, 1), "test")
        session.get_one(CheckpointRow, checkpoint_id(job.id, 300, 1)).deleted_at = NOW
    assert step_of(f"{job.id}/best") == 100
    assert step_of(f"{job.id}/latest") == 200
    assert step_of(checkpoint_id(job.id, 300, 1)) is None


def test_best_by_loss_is_the_lowest(db: Database, store: MemoryStore) -> None:
    job = add_job(db, make_spec(checkpoint={"keep_last": 1, "keep_best": 1, "metric": "eval/loss"}))
    for step, loss in ((100, 0.9), (200, 0.3), (300, 0.7)):
        put_checkpoint(store, job, 1, step, metrics={"eval/loss": loss})
    register_manifests(db, store, job.id)
    with db.reader() as session:
        best = best_checkpoint(session, job.id)
    assert best is not None
    assert best.step == 200


def test_best_of_a_job_that_was_never_evaluated_is_the_newest(db: Database, store: MemoryStore, job: JobRow) -> None:
    for step in (100, 200):
        put_checkpoint(store, job, 1, step)
    register_manifests(db, store, job.id)
    with db.reader() as session:
        best = best_checkpoint(session, job.id)
    assert best is not None
    assert best.step == 200


# -- retention ----------------------------------------------------------------------
def row(step: int, top1: float | None = None, **fields: Any) -> CheckpointRow:
    values = {"id": f"s{step}", "attempt": 1, "valid": True, "pinned": False}
    metrics = {} if top1 is None else {"eval/top1": top1}
    return CheckpointRow(step=step, metrics=metrics, **(values | fields))


@pytest.mark.parametrize(
    ("rows", "keep", "referenced", "expected"),
    [
        ([row(1), row(2), row(3)], Keep(2, 0, "eval/top1"), (), ["s1"]),
        ([row(1, 0.9), row(2, 0.1), row(3, 0.2)], Keep(1, 1, "eval/top1"), (), ["s2"]),
        ([row(1, 0.9), row(2, 0.8), row(3, 0.2)], Keep(1, 2, "eval/top1"), (), []),
        ([row(1, pinned=True), row(2), row(3)], Keep(1, 0, "eval/top1"), (), ["s2"]),
        ([row(1), row(2), row(3)], Keep(1, 0, "eval/top1"), ("s1",), ["s2"]),
        ([row(1), row(2, valid=False), row(3)], Keep(2, 0, "eval/top1"), (), ["s2"]),
        ([row(1), row(2, valid=False)], Keep(1, 0, "eval/top1"), (), []),
        ([row(1, 0.1), row(2, 0.9, valid=False), row(3)], Keep(1, 1, "eval/top1"), (), ["s2"]),
        ([row(7)], Keep(1, 0, "eval/top1"), (), []),
        ([], Keep(1, 1, "eval/top1"), (), []),
    ],
)
def test_what_nothing_protects_goes(
    rows: list[CheckpointRow], keep: Keep, referenced: tuple[str, ...], expected: list[str]
) -> None:
    assert [r.id for r in superfluous(rows, keep, referenced)] == expected


@pytest.mark.db
def test_retention_deletes_objects_and_keeps_the_rows(db: Database, store: MemoryStore, job: JobRow) -> None:
    for step, top1 in ((100, 0.9), (200, 0.1), (300, 0.2), (400, 0.3)):
        put_checkpoint(store, job, 1, step, metrics={"eval/top1": top1})
    register_manifests(db, store, job.id)
    assert apply_retention(db, store, job.id, NOW) == [checkpoint_id(job.id, 200, 1)]
    assert steps(db, job) == [100, 300, 400]
    assert not any(key.startswith(checkpoint_prefix(job.id, 200, 1)) for key in store.objects)
    assert register_manifests(db, store, job.id) == []
    assert apply_retention(db, store, job.id, NOW) == []


def test_what_other_jobs_and_running_attempts_start_from_is_kept(db: Database, store: MemoryStore, job: JobRow) -> None:
    ids = [put_checkpoint(store, job, 1, step) for step in (100, 200, 300, 400, 500, 600)]
    register_manifests(db, store, job.id)
    add_job(db, init_from=ids[0])
    add_job(db, resume_from=ids[1])
    finished = add_job(db, init_from=ids[2])
    with db.session() as session:
        session.get_one(JobRow, finished.id).state = JobState.SUCCEEDED
    add_attempt(db, job, 1, from_checkpoint=ids[3])
    assert apply_retention(db, store, job.id, NOW) == [ids[2]]


def test_a_promised_reference_protects_what_it_means_now(db: Database, store: MemoryStore, job: JobRow) -> None:
    spec = make_spec(checkpoint={"keep_last": 1, "keep_best": 0, "metric": "eval/top1"})
    source = add_job(db, spec)
    best = put_checkpoint(store, source, 1, 100, metrics={"eval/top1": 0.9})
    for step in (200, 300):
        put_checkpoint(store, source, 1, step, metrics={"eval/top1": 0.1})
    register_manifests(db, store, source.id)
    add_job(db, init_from=f"{source.id}/best")
    assert apply_retention(db, store, source.id, NOW) == [checkpoint_id(source.id, 200, 1)]
    assert best in {checkpoint_id(source.id, step, 1) for step in steps(db, source)}


class CutOff(MemoryStore):
    """Goes away after so many deletions."""

    deletions_left = 1

    def delete(self, keys: Any) -> None:
        if self.deletions_left == 0:
            raise StoreUnavailable("cut off")
        self.deletions_left -= 1
        super().delete(keys)


def test_a_deletion_cut_off_leaves_no_half_checkpoint_and_is_finished_later(db: Database, job: JobRow) -> None:
    store = CutOff()
    for step in (100, 200, 300):
        put_checkpoint(store, job, 1, step)
    register_manifests(db, store, job.id)
    prefix = checkpoint_prefix(job.id, 100, 1)
    with pytest.raises(StoreUnavailable):
        apply_retention(db, store, job.id, NOW)
    assert manifest_key(prefix) not in store.objects
    assert any(key.startswith(prefix) for key in store.objects)
    assert register_manifests(db, store, job.id) == []
    store.deletions_left = 9
    assert sweep(db, store, job.id) == [prefix]
    assert not any(key.startswith(prefix) for key in store.objects)


def test_sweep_takes_only_what_ended_attempts_left_unfinished(db: Database, store: MemoryStore, job: JobRow) -> None:
    add_attempt(db, job, 1, state=AttemptState.ENDED)
    add_attempt(db, job, 2, state=AttemptState.RUNNING)
    put_checkpoint(store, job, 1, 100)
    register_manifests(db, store, job.id)
    for attempt, step in ((1, 200), (2, 300), (3, 400)):
        store.put(f"{checkpoint_prefix(job.id, step, attempt)}shards/part", b"half")
    put_checkpoint(store, job, 1, 500)  # committed, not registered yet
    assert sweep(db, store, job.id) == [checkpoint_prefix(job.id, 200, 1)]
    assert register_manifests(db, store, job.id) == [checkpoint_id(job.id, 500, 1)]
