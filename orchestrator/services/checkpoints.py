"""Checkpoints, exports and reports as users read them: what there is, and its files.

File names come from the manifest (or the listing of an export) and from nowhere else: a name that is not in it does not
exist, whatever it spells.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from configs.ids import CHECKPOINT_ID
from configs.layout import export_prefix, manifest_key, report_key
from configs.spec import ExportFormat
from configs.wire import EvaluationReport, Manifest
from orchestrator.schemas import CheckpointEdit, CheckpointPage, CheckpointPublic, ExportPage, ExportPublic, FilePublic
from orchestrator.services.auth import Actor
from orchestrator.services.jobs import find_job
from orchestrator.services.problems import NotFound, RangeNotSatisfiable, Unavailable, WrongState
from orchestrator.services.public import checkpoint_public
from orchestrator.storage import store as object_store
from orchestrator.storage.db import Database
from orchestrator.storage.events import lock_job, record
from orchestrator.storage.registry import resolve_ref
from orchestrator.storage.store import ObjectStore
from orchestrator.storage.tables import CheckpointRow, JobRow

EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
_RANGE = re.compile(r"^bytes=(\d{0,19})-(\d{0,19})$")


@dataclass(frozen=True)
class StoredFile:
    """A file ready to be sent."""

    key: str
    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class ByteRange:
    """The bytes [start, end] of a file, both included."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start + 1


def list_checkpoints(db: Database, job_id: str) -> CheckpointPage:
    """The job's checkpoints, the newest first, deleted ones too. Raises NotFound."""
    with db.reader() as session:
        find_job(session, job_id)
        query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
        rows = session.scalars(query.order_by(CheckpointRow.step.desc(), CheckpointRow.attempt.desc()))
        aliases = _aliases(session, job_id)
        return CheckpointPage(items=tuple(checkpoint_public(row, aliases.get(row.id, ())) for row in rows))


def get_checkpoint(db: Database, checkpoint_id: str) -> CheckpointPublic:
    """Raises NotFound."""
    with db.reader() as session:
        row = _find(session, checkpoint_id)
        return checkpoint_public(row, _aliases(session, row.job_id).get(row.id, ()))


def edit_checkpoint(db: Database, actor: Actor, checkpoint_id: str, wanted: CheckpointEdit) -> CheckpointPublic:
    """Pin a checkpoint, or let go of it. What it is already is no change.

    Raises:
        NotFound
        WrongState: it was deleted, or does not count any more, and is to be pinned.
    """
    with db.session() as session:
        row = _find(session, checkpoint_id)
        # In this order, as retention takes them.
        lock_job(session, row.job_id)
        session.refresh(row, with_for_update=True)
        if wanted.pinned and (row.deleted_at is not None or not row.valid):
            why = "it was deleted" if row.deleted_at is not None else "it does not count any more"
            raise WrongState(f"Checkpoint {row.id} cannot be pinned: {why}.", allowed_actions=[])
        if wanted.pinned != row.pinned:
            row.pinned = wanted.pinned
            what = "pinned" if wanted.pinned else "unpinned"
            message = f"Checkpoint {row.id} of step {row.step} was {what}"
            record(session, row.job_id, f"checkpoint.{what}", message, actor.name, data={"checkpoint_id": row.id})
        return checkpoint_public(row, _aliases(session, row.job_id).get(row.id, ()))


def get_manifest(db: Database, store: ObjectStore, checkpoint_id: str) -> Manifest:
    """The checkpoint's manifest, from the object store.

    Raises:
        NotFound: there is no such checkpoint, or it was deleted.
    """
    with db.reader() as session:
        prefix = _available_prefix(_find(session, checkpoint_id))
    return _read_manifest(store, prefix)


def checkpoint_file(db: Database, store: ObjectStore, checkpoint_id: str, name: str) -> StoredFile:
    """A file of a checkpoint.

    Raises:
        NotFound: no such checkpoint, or no such file in its manifest.
    """
    with db.reader() as session:
        prefix = _available_prefix(_find(session, checkpoint_id))
    if name == "manifest.json":
        key = manifest_key(prefix)
        return StoredFile(key, name, store.head(key).size, _etag(checkpoint_id, name))
    for file in _read_manifest(store, prefix).files:
        if file.name == name:
            checksums = ",".join(map(str, file.crc32c))
            return StoredFile(prefix + name, name, file.num_bytes, _etag(checkpoint_id, name, checksums))
    raise NotFound(f"Checkpoint {checkpoint_id} has no file {name!r}.", hint="Its manifest names its files.")


def list_exports(db: Database, store: ObjectStore, job_id: str) -> ExportPage:
    """What the job exported. Raises NotFound."""
    _require_job(db, job_id)
    found = [(fmt, _export_files(store, job_id, fmt)) for fmt in EXPORT_FORMATS]
    return ExportPage(
        items=tuple(
            ExportPublic(format=fmt, files=tuple(FilePublic(name=f.name, num_bytes=f.size) for f in files))
            for fmt, files in found
            if files
        )
    )


def export_file(db: Database, store: ObjectStore, job_id: str, fmt: str, name: str) -> StoredFile:
    """A file of an export.

    Raises:
        NotFound: no such job, format or file.
    """
    _require_job(db, job_id)
    files = _export_files(store, job_id, fmt) if fmt in EXPORT_FORMATS else []
    for file in files:
        if file.name == name:
            return file
    raise NotFound(f"Job {job_id} has no file {name!r} exported as {fmt!r}.")


def get_report(db: Database, store: ObjectStore, job_id: str) -> EvaluationReport:
    """What an evaluate job found.

    Raises:
        NotFound: no such job, or it has no report (yet).
    """
    job = _require_job(db, job_id)
    try:
        return EvaluationReport.model_validate_json(store.get(report_key(job_id)))
    except object_store.NotFound:
        raise NotFound(
            f"Job {job_id} has no report: it is a {job.kind} job and {job.state}.",
            hint="An evaluate job leaves one when it has succeeded.",
        ) from None


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """The range a Range header asks for; None: the whole file (no header, or one that RFC 9110 says to ignore).

    Raises:
        RangeNotSatisfiable: it lies outside the file.
    """
    match = _RANGE.match((header or "").replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        start, end = max(0, size - int(last)), size - 1
        satisfiable = int(last) > 0 and size > 0
    else:
        start, end = int(first), min(int(last), size - 1) if last else size - 1
        if last and int(last) < start:
            return None
        satisfiable = start < size
    if not satisfiable:
        raise RangeNotSatisfiable(
            f"{header} lies outside the file of {size} bytes.", headers={"Content-Range": f"bytes */{size}"}
        )
    return ByteRange(start, end)


def stream_file(store: ObjectStore, file: StoredFile, wanted: ByteRange | None) -> Iterator[bytes]:
    """The file's bytes in chunks. Raises NotFound at the call, before anything is sent."""
    try:
        if wanted is None:
            return store.stream(file.key)
        return store.stream(file.key, wanted.start, wanted.length)
    except object_store.NotFound:
        raise NotFound(f"{file.name} is gone from the object store.") from None


def _find(session: Session, checkpoint_id: str) -> CheckpointRow:
    row = session.get(CheckpointRow, checkpoint_id) if CHECKPOINT_ID.match(checkpoint_id) else None
    if row is None:
        raise NotFound(f"There is no checkpoint {checkpoint_id!r}.", hint="`patchwork show JOB` lists a job's.")
    return row


def _available_prefix(row: CheckpointRow) -> str:
    if row.deleted_at is not None:
        raise NotFound(
            f"Checkpoint {row.id} was deleted at {row.deleted_at.isoformat()}.",
            hint="checkpoint.keep_last and checkpoint.keep_best say how many a job keeps.",
        )
    return row.prefix


def _read_manifest(store: ObjectStore, prefix: str) -> Manifest:
    key = manifest_key(prefix)
    try:
        return Manifest.model_validate_json(store.get(key))
    except object_store.NotFound:
        raise NotFound(f"{key} is gone from the object store.") from None
    except ValidationError as error:
        raise Unavailable(f"{key} cannot be read: {error.error_count()} fields are not as they should be.") from None


def _aliases(session: Session, job_id: str) -> dict[str, list[str]]:
    aliases: dict[str, list[str]] = {}
    for alias in ("best", "latest"):
        row = resolve_ref(session, f"{job_id}/{alias}")
        if row is not None:
            aliases.setdefault(row.id, []).append(alias)
    return aliases


def _require_job(db: Database, job_id: str) -> JobRow:
    with db.reader() as session:
        return find_job(session, job_id)


def _export_files(store: ObjectStore, job_id: str, fmt: str) -> list[StoredFile]:
    prefix = export_prefix(job_id, fmt)
    files = [
        StoredFile(item.key, item.key.removeprefix(prefix), item.size, _etag(job_id, fmt, item.key, str(item.size)))
        for item in store.list(prefix)
    ]
    return sorted(files, key=lambda file: file.name)


def _etag(*parts: str) -> str:
    return '"' + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32] + '"'
