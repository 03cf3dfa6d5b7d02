"""The registry of checkpoints: rows made from the manifests that lie in the object store, and from nothing else.

A checkpoint exists when its manifest exists and the lineage rule counts it. Rows are a cache: delete them all and
`register_manifests` brings them back. Retention works the other way round than publishing: the row first, then the
manifest, then the shards, so that nothing half deleted is ever offered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog
from pydantic import ValidationError
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from configs.ids import checkpoint_id
from configs.layout import attempt_key, attempts_prefix, checkpoint_prefix, checkpoints_prefix, manifest_key
from configs.lineage import cuts, is_in_lineage
from configs.states import AttemptState, JobState
from configs.wire import AttemptFile, Manifest, ParentCut
from orchestrator.storage.db import Database, upsert
from orchestrator.storage.events import RECONCILER, lock_job, record
from orchestrator.storage.store import NotFound, ObjectStore
from orchestrator.storage.tables import AttemptRow, CheckpointRow, EventRow, JobRow

log = structlog.get_logger(__name__)
_PREFIX = re.compile(r"step-([0-9]{9})-a([0-9]{4})/$")
_ATTEMPT_FILE = re.compile(r"/([0-9]{4})\.json$")
_LOWER_IS_BETTER = ("eval/loss",)
_TERMINAL = [state for state in JobState if state.is_terminal]


# -- reading ----------------------------------------------------------------------
def resolve_ref(session: Session, ref: str, *, hold: bool = False) -> CheckpointRow | None:
    """The checkpoint that `ref` names: `ckpt_…`, `job_…/best` or `job_…/latest`; None if there is none (any more).

    With `hold` its row is locked until the transaction ends, so that retention cannot delete it before the reference
    to it is stored.
    """
    job_id, _, which = ref.partition("/")
    if not which:
        row = session.get(CheckpointRow, ref)
        found = row if row is not None and row.valid and row.deleted_at is None else None
    elif which == "best":
        found = best_checkpoint(session, job_id)
    else:
        found = newest_checkpoint(session, job_id)
    if found is None or not hold:
        return found
    statement = select(CheckpointRow).where(CheckpointRow.id == found.id).with_for_update()
    held = session.scalars(statement.execution_options(populate_existing=True)).one()
    return held if held.valid and held.deleted_at is None else None


def newest_checkpoint(session: Session, job_id: str, up_to_step: int | None = None) -> CheckpointRow | None:
    """The checkpoint furthest into the job's training, or None. With `up_to_step` the furthest up to there; where there
    is none, the first one beyond it."""
    counted = select(CheckpointRow).where(*_available(job_id)).limit(1)
    furthest = counted.order_by(CheckpointRow.step.desc(), CheckpointRow.attempt.desc())
    if up_to_step is None:
        return session.scalars(furthest).first()
    before = session.scalars(furthest.where(CheckpointRow.step <= up_to_step)).first()
    return before or session.scalars(counted.order_by(CheckpointRow.step, CheckpointRow.attempt.desc())).first()


def best_checkpoint(session: Session, job_id: str) -> CheckpointRow | None:
    """The checkpoint with the best `checkpoint.metric`; the newest where none was evaluated; None if there is none."""
    job = session.get(JobRow, job_id)
    if job is None:
        return None
    rows = list(session.scalars(select(CheckpointRow).where(*_available(job_id))))
    ranked = _ranked(rows, _checkpoint_spec(job).metric)
    return ranked[0] if ranked else newest_checkpoint(session, job_id)


def _available(job_id: str) -> tuple[Any, ...]:
    return CheckpointRow.job_id == job_id, CheckpointRow.valid.is_(True), CheckpointRow.deleted_at.is_(None)


# -- registering ----------------------------------------------------------------------
def register_manifests(
    db: Database, store: ObjectStore, job_id: str, guard: Callable[[Session], object] | None = None
) -> list[str]:
    """Make rows of the job's manifests that have none yet. Returns the ids of those that are new and count.

    `guard` runs first in the transaction that writes, and raises if the caller may not act for the job any more: by
    then a newer attempt may have cut what was counted here.

    Raises:
        StoreError: the object store could not be read; nothing was changed.
    """
    with db.reader() as session:
        job = session.get_one(JobRow, job_id)
        known = set(session.scalars(select(CheckpointRow.prefix).where(CheckpointRow.job_id == job_id)))
    unknown = [prefix for prefix in store.folders(checkpoints_prefix(job_id)) if prefix not in known]
    if not unknown:
        return []
    manifests = [m for prefix in unknown if (m := _read_manifest(store, job, prefix)) is not None]
    if not manifests:
        return []
    parents = read_cuts(store, job_id)
    rows = [_row(manifest, is_in_lineage(manifest.attempt, manifest.step, parents)) for manifest in manifests]
    with db.session() as session:
        if guard is not None:
            guard(session)
        upsert(session, CheckpointRow, rows, ["id"], update=[])
        for row in rows:
            _record_registered(session, row)
    return [row["id"] for row in rows if row["valid"]]


def read_cuts(store: ObjectStore, job_id: str) -> tuple[ParentCut, ...]:
    """How far each ended attempt counts, from the attempt files alone. A file that cannot be parsed says nothing."""
    files = []
    for item in store.list(attempts_prefix(job_id)):
        if _ATTEMPT_FILE.search(item.key):
            try:
                files.append(AttemptFile.model_validate_json(store.get(item.key)))
            except (ValidationError, NotFound) as error:
                log.warning("Attempt file ignored.", key=item.key, error=str(error))
    return cuts(files)


def read_attempt_file(store: ObjectStore, attempt_id: str) -> AttemptFile:
    """What the attempt was given. Raises NotFound, ValidationError."""
    return AttemptFile.model_validate_json(store.get(attempt_key(attempt_id)))


def is_complete(store: ObjectStore, prefix: str) -> bool:
    """Whether every file that the manifest under `prefix` names is there with its size. Contents are not read: the
    workers verify each block they load."""
    try:
        manifest = Manifest.model_validate_json(store.get(manifest_key(prefix)))
    except (NotFound, ValidationError):
        return False
    present = {item.key: item.size for item in store.list(prefix)}
    return all(present.get(prefix + file.name) == file.num_bytes for file in manifest.files)


def invalidate(session: Session, job_id: str, checkpoint: str, why: str, attempt: int | None = None) -> None:
    """Never continue from this checkpoint again; nothing is deleted."""
    row = session.get(CheckpointRow, checkpoint)
    if row is None or not row.valid:
        return
    row.valid = False
    record(
        session,
        job_id,
        "checkpoint.invalidated",
        f"Checkpoint {checkpoint} is not used any more: {why}",
        RECONCILER,
        attempt=attempt,
        data={"checkpoint_id": checkpoint},
    )


def apply_cuts(session: Session, job_id: str, parents: Iterable[ParentCut]) -> None:
    """Mark rows that the lineage rule no longer counts."""
    for cut in parents:
        beyond = (CheckpointRow.attempt == cut.attempt, CheckpointRow.step > cut.step)
        session.execute(update(CheckpointRow).where(CheckpointRow.job_id == job_id, *beyond).values(valid=False))


def _read_manifest(store: ObjectStore, job: JobRow, prefix: str) -> Manifest | None:
    """The manifest, or None if it is not there yet, torn, or not one of this job's."""
    match = _PREFIX.search(prefix)
    if match is None:
        return None
    try:
        manifest = Manifest.model_validate_json(store.get(manifest_key(prefix)))
    except NotFound:
        return None
    except ValidationError as error:
        log.warning("Manifest ignored: it cannot be parsed.", prefix=prefix, error=str(error))
        return None
    says = (manifest.job_id, manifest.step, manifest.attempt, manifest.training_fingerprint)
    expected = (job.id, int(match[1]), int(match[2]), job.training_fingerprint)
    if says != expected:
        log.warning("Manifest ignored: it is not this checkpoint's.", prefix=prefix, says=says, expected=expected)
        return None
    return manifest


def _row(manifest: Manifest, valid: bool) -> dict[str, Any]:
    job_id, step, attempt = manifest.job_id, manifest.step, manifest.attempt
    return {
        "id": checkpoint_id(job_id, step, attempt),
        "job_id": job_id,
        "attempt": attempt,
        "step": step,
        "prefix": checkpoint_prefix(job_id, step, attempt),
        "num_bytes": sum(file.num_bytes for file in manifest.files),
        "metrics": manifest.metrics,
        "model": manifest.model.model_dump(mode="json"),
        "preprocess": manifest.preprocess.model_dump(mode="json"),
        "valid": valid,
        "pinned": False,
        "origin": None if manifest.origin is None else manifest.origin.model_dump(mode="json"),
        "created_at": manifest.created_at if manifest.created_at.tzinfo else manifest.created_at.replace(tzinfo=UTC),
    }


def _record_registered(session: Session, row: dict[str, Any]) -> None:
    if row["valid"]:
        record_committed(session, row["job_id"], row["attempt"], row["id"], RECONCILER)
        return
    message = (
        f"Checkpoint {row['id']} was committed after another attempt had taken over from attempt {row['attempt']}: "
    )
    message += "it does not count"
    data = {"checkpoint_id": row["id"]}
    record(session, row["job_id"], "checkpoint.ignored", message, RECONCILER, attempt=row["attempt"], data=data)


def record_committed(session: Session, job_id: str, attempt: int, checkpoint: str, actor: str) -> None:
    """Say that a checkpoint exists, unless that was said: the attempt reports it and the reconciler finds its manifest,
    in either order."""
    lock_job(session, job_id)
    said = select(EventRow.seq).where(
        EventRow.job_id == job_id,
        EventRow.type == "checkpoint.committed",
        EventRow.data["checkpoint_id"].as_string() == checkpoint,
    )
    if session.scalar(said.limit(1)) is None:
        message, data = f"Checkpoint {checkpoint} was committed", {"checkpoint_id": checkpoint}
        record(session, job_id, "checkpoint.committed", message, actor, attempt=attempt, data=data)


# -- retention ----------------------------------------------------------------------
@dataclass(frozen=True)
class Keep:
    """What a job's `checkpoint` section says of keeping."""

    last: int
    best: int
    metric: str


def apply_retention(db: Database, store: ObjectStore, job_id: str, now: datetime) -> list[str]:
    """Delete what the job's retention does not keep. Returns the ids deleted now.

    Kept are the last k, the best k, pinned ones, the newest that counts, and whatever a job that has not ended, or an
    attempt that runs, starts from.

    Raises:
        StoreError: the store failed on the way; the next call goes on with what is left.
    """
    with db.session() as session:
        job = lock_job(session, job_id)
        assert job is not None, "jobs are never deleted"
        present = CheckpointRow.job_id == job_id, CheckpointRow.deleted_at.is_(None)
        rows = list(session.scalars(select(CheckpointRow).where(*present).with_for_update()))
        doomed = superfluous(rows, _checkpoint_spec(job), _referenced(session, job_id))
        for row in doomed:
            row.deleted_at = now
            message = f"Checkpoint {row.id} of step {row.step} was deleted by retention"
            record(session, job_id, "checkpoint.deleted", message, RECONCILER, data={"checkpoint_id": row.id}, at=now)
        prefixes = [row.prefix for row in doomed]
    for prefix in prefixes:
        delete_checkpoint(store, prefix)
    return [row.id for row in doomed]


def superfluous(rows: Iterable[CheckpointRow], keep: Keep, referenced: Iterable[str]) -> list[CheckpointRow]:
    """Those of `rows` that nothing protects, oldest first. Pure."""
    rows = sorted(rows, key=lambda row: (row.step, row.attempt))
    counted = [row for row in rows if row.valid]
    protected = {row.id for row in counted[-keep.last :]} | {row.id for row in rows if row.pinned} | set(referenced)
    protected |= {row.id for row in _ranked(counted, keep.metric)[: keep.best]}
    newest_step = counted[-1].step if counted else -1
    # One that does not count may only go once training is past it: a verification that failed may be examined, and
    # an operator may still want it back.
    return [row for row in rows if row.id not in protected and (row.valid or row.step <= newest_step)]


def sweep(db: Database, store: ObjectStore, job_id: str) -> list[str]:
    """Remove shards without a manifest that attempts which have ended left, and what an interrupted deletion left.
    Returns the prefixes removed.

    Raises:
        StoreError: as `apply_retention`.
    """
    with db.reader() as session:
        rows = session.execute(
            select(CheckpointRow.prefix, CheckpointRow.deleted_at).where(CheckpointRow.job_id == job_id)
        )
        deleted_at = {row.prefix: row.deleted_at for row in rows}
        ended = set(
            session.scalars(
                select(AttemptRow.number).where(AttemptRow.job_id == job_id, AttemptRow.state == AttemptState.ENDED)
            )
        )
    removed = []
    for prefix in store.folders(checkpoints_prefix(job_id)):
        match = _PREFIX.search(prefix)
        if match is None:
            continue
        half_deleted = prefix in deleted_at and deleted_at[prefix] is not None
        # A manifest that was ignored (torn, of another job) is left for people to look at.
        orphaned = prefix not in deleted_at and int(match[2]) in ended and not _has_manifest(store, prefix)
        if (half_deleted or orphaned) and delete_checkpoint(store, prefix):
            removed.append(prefix)
    return removed


def delete_checkpoint(store: ObjectStore, prefix: str) -> int:
    """Delete a checkpoint's objects, its manifest first: without it there is no checkpoint. Returns how many."""
    keys = [item.key for item in store.list(prefix)]
    store.delete([manifest_key(prefix)])
    store.delete(keys)
    return len(keys)


def _has_manifest(store: ObjectStore, prefix: str) -> bool:
    try:
        store.head(manifest_key(prefix))
    except NotFound:
        return False
    return True


def _referenced(session: Session, job_id: str) -> set[str]:
    """Checkpoints that jobs which have not ended, or attempts which run, start from."""
    live_jobs = select(JobRow.init_from, JobRow.resume_from).where(JobRow.state.not_in(_TERMINAL))
    refs = {ref for pair in session.execute(live_jobs) for ref in pair if ref is not None}
    live_attempts = select(AttemptRow.from_checkpoint).where(AttemptRow.state != AttemptState.ENDED)
    refs |= {ref for ref in session.scalars(live_attempts) if ref is not None}
    for ref in [ref for ref in refs if ref.startswith(f"{job_id}/")]:
        row = resolve_ref(session, ref)
        if row is not None:
            refs.add(row.id)
    return refs


def _checkpoint_spec(job: JobRow) -> Keep:
    section = json.loads(job.spec_json).get("checkpoint") or {}
    return Keep(section.get("keep_last", 1), section.get("keep_best", 0), section.get("metric", "eval/top1"))


def _ranked(rows: Iterable[CheckpointRow], metric: str) -> list[CheckpointRow]:
    """Those that were evaluated, best first; of equals the later one."""
    sign = 1.0 if metric in _LOWER_IS_BETTER else -1.0
    evaluated = [row for row in rows if row.metrics.get(metric) is not None]
    return sorted(evaluated, key=lambda row: (sign * row.metrics[metric], -row.step, -row.attempt))
