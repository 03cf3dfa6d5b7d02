"""Weights files on their way in: an upload in parts, straight to the object store, that becomes an import job.

    create -> URLs of parts, the client PUTs them -> complete: the job is queued
                                                  -> abort, or the controller's sweep when it has expired

The API never carries a byte of the file. Who asks again to import the same file (same token, SHA-256 and size) is given
the upload that is open, with the parts that have arrived: that is how an interrupted one goes on.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from configs.ids import UPLOAD_ID, new_upload_id
from configs.imports import refused_by_name
from configs.layout import upload_key
from orchestrator.schemas import ImportCreate, JobPublic, PartPublic, PartUrl, PartUrls, PartUrlsCreate, UploadPublic
from orchestrator.services.auth import Actor
from orchestrator.services.jobs import find_job, publish
from orchestrator.services.problems import Conflict, Invalid, NotFound, WrongState, field_error
from orchestrator.services.submission import queue_import
from orchestrator.settings import Settings
from orchestrator.storage import store as object_store
from orchestrator.storage.db import Database
from orchestrator.storage.events import record
from orchestrator.storage.store import ObjectStore, StoredPart
from orchestrator.storage.tables import UploadRow

PART_BYTES = 32 * 1024**2
MAX_PARTS = 10_000
"""Of S3; it also takes no part but the last under 5 MiB."""
_MIB = 1024**2
URL_EXPIRES_S = 3600


def create_upload(
    db: Database, store: ObjectStore, settings: Settings, actor: Actor, request: ImportCreate
) -> tuple[UploadPublic, bool]:
    """An upload for this file, and whether it is new: the open one of the same content goes on, with what is asked for
    now.

    Raises:
        Invalid: the file is of a kind that is not read, or too large.
    """
    _check(request, settings)
    now = datetime.now(UTC)
    with db.session() as session:
        row = _open_one(session, actor, request, now)
        is_new = row is None
        if row is None:
            row = UploadRow(
                id=new_upload_id(),
                state="OPEN",
                request={},
                sha256=request.sha256,
                num_bytes=request.num_bytes,
                part_bytes=_part_bytes(request.num_bytes),
                token_id=actor.token_id,
                created_at=now,
                expires_at=now + timedelta(seconds=settings.upload_expires_s),
            )
            session.add(row)
        row.request = request.model_dump(mode="json")
        upload_id, store_upload = row.id, row.store_upload
    if store_upload is None:
        # Not in the transaction: a begun upload that no row names is found and aborted by the sweep.
        begun = store.create_upload(upload_key(upload_id))
        with db.session() as session:
            row = session.get_one(UploadRow, upload_id, with_for_update=True)
            row.store_upload = row.store_upload or begun
    return get_upload(db, store, upload_id), is_new


def get_upload(db: Database, store: ObjectStore, upload_id: str) -> UploadPublic:
    """The upload, with the parts that have arrived. Raises NotFound."""
    with db.reader() as session:
        row = _find(session, upload_id)
    return _public(row, _parts(store, row))


def part_urls(db: Database, store: ObjectStore, upload_id: str, request: PartUrlsCreate) -> PartUrls:
    """Where to PUT these parts.

    Raises:
        NotFound: there is no such upload.
        WrongState: it is not open any more.
        Invalid: it has no such part.
    """
    with db.reader() as session:
        row = _find(session, upload_id)
    name = _store_upload(row)
    count = _num_parts(row)
    for index, number in enumerate(request.parts):
        if number > count:
            errors = [field_error(f"/parts/{index}", f"part {number}: the upload has {count}", number, f"1 to {count}")]
            raise Invalid("There is no such part.", errors=errors)
    key = upload_key(row.id)
    return PartUrls(
        items=tuple(
            PartUrl(
                number=number,
                num_bytes=_size_of(row, number),
                url=store.presign_part(key, name, number, URL_EXPIRES_S),
            )
            for number in request.parts
        ),
        expires_at=datetime.now(UTC) + timedelta(seconds=URL_EXPIRES_S),
    )


def complete_upload(db: Database, store: ObjectStore, actor: Actor, upload_id: str) -> JobPublic:
    """Put the parts together and queue the import job. Again: the same job.

    Raises:
        NotFound: there is no such upload.
        WrongState: it was aborted.
        Conflict: parts are missing, or have not the size they should have.
    """
    with db.reader() as session:
        row = _find(session, upload_id)
    if row.state != "COMPLETED":
        _put_together(store, row)
        with db.session() as session:
            row = session.get_one(UploadRow, upload_id, with_for_update=True)
            if row.state == "OPEN":
                row.job_id = queue_import(session, actor, _job(row))
                row.state = "COMPLETED"
                message = f"{row.request['file']} was uploaded by {actor.name}, {row.num_bytes} bytes"
                record(session, row.job_id, "import.uploaded", message, actor.name, data={"upload_id": row.id})
    with db.reader() as session:
        row = session.get_one(UploadRow, upload_id)
        if row.job_id is None:
            raise WrongState(f"Upload {row.id} was aborted.", hint="Import the file again.", state=row.state)
        return publish(session, [find_job(session, row.job_id)])[0]


def abort_upload(db: Database, store: ObjectStore, upload_id: str) -> None:
    """Give the upload up and delete its parts. Again: no error.

    Raises:
        NotFound: there is no such upload.
        WrongState: it is complete; cancel its job instead.
    """
    with db.session() as session:
        row = session.get(UploadRow, _find(session, upload_id).id, with_for_update=True)
        assert row is not None, "uploads are never deleted"
        if row.state == "COMPLETED":
            raise WrongState(
                f"Upload {row.id} is complete.", hint=f"Cancel its job: patchwork cancel {row.job_id}", state=row.state
            )
        row.state = "ABORTED"
        name = row.store_upload
    key = upload_key(upload_id)
    if name is not None:
        store.abort_upload(key, name)
    store.delete([key])
    with db.session() as session:
        session.get_one(UploadRow, upload_id).deleted_at = datetime.now(UTC)


def _check(request: ImportCreate, settings: Settings) -> None:
    reason = refused_by_name(request.file)
    if reason is not None:
        raise Invalid("The file cannot be imported.", errors=[field_error("/file", reason, request.file)])
    if request.num_bytes > settings.max_import_bytes:
        limit = settings.max_import_bytes
        message = f"{request.num_bytes} bytes, this server takes at most {limit}"
        raise Invalid(
            "The file is too large.",
            hint="PATCHWORK_MAX_IMPORT_BYTES of the server sets the limit.",
            errors=[field_error("/num_bytes", message, request.num_bytes, f"at most {limit}")],
        )
    if request.format == "npz" and not request.file.lower().endswith(".npz"):
        message = f"format npz, and the file is {request.file}"
        raise Invalid("The file cannot be imported.", errors=[field_error("/format", message, request.format)])


def _open_one(session: Session, actor: Actor, request: ImportCreate, now: datetime) -> UploadRow | None:
    query = select(UploadRow).where(
        UploadRow.token_id == actor.token_id,
        UploadRow.sha256 == request.sha256,
        UploadRow.num_bytes == request.num_bytes,
        UploadRow.state == "OPEN",
        UploadRow.expires_at > now,
    )
    return session.scalars(query.order_by(UploadRow.created_at.desc()).limit(1).with_for_update()).first()


def _put_together(store: ObjectStore, row: UploadRow) -> None:
    key, name = upload_key(row.id), _store_upload(row)
    try:
        parts = store.list_parts(key, name)
        sizes = {part.number: part.size for part in parts}
        wrong = [n for n in range(1, _num_parts(row) + 1) if sizes.get(n) != _size_of(row, n)]
        if wrong:
            shown = ", ".join(map(str, wrong[:10])) + (" …" if len(wrong) > 10 else "")
            raise Conflict(
                f"{len(wrong)} of {_num_parts(row)} parts are missing or incomplete: {shown}.",
                hint="Send them (GET the upload says which have arrived), then complete it again.",
            )
        store.complete_upload(key, name, parts)
    except object_store.NotFound:
        # Complete already, if an earlier call got so far and no further.
        try:
            size = store.head(key).size
        except object_store.NotFound:
            raise Conflict(f"The object store has lost upload {row.id}.", hint="Import the file again.") from None
        if size != row.num_bytes:
            raise Conflict(f"Upload {row.id} has {size} bytes, {row.num_bytes} were announced.") from None


def _job(row: UploadRow) -> dict[str, Any]:
    asked = row.request
    return {
        "kind": "import",
        "name": asked["name"] or asked["file"],
        "queue": {"project": asked["project"]},
        "resources": {"workers": 1, "gpus_per_worker": 0},
        "file": {
            "upload": row.id,
            "name": asked["file"],
            "num_bytes": row.num_bytes,
            "sha256": row.sha256,
            "source": asked["source"],
        },
        **{part: asked[part] for part in ("format", "model", "preprocess", "config")},
    }


def _find(session: Session, upload_id: str) -> UploadRow:
    row = session.get(UploadRow, upload_id) if UPLOAD_ID.match(upload_id) else None
    if row is None:
        raise NotFound(f"There is no upload {upload_id!r}.", hint="POST /v1/checkpoints:import begins one.")
    return row


def _store_upload(row: UploadRow) -> str:
    """The store's name of an open upload. Raises WrongState."""
    if row.state != "OPEN" or row.store_upload is None:
        raise WrongState(f"Upload {row.id} is {row.state}, not open.", hint="Import the file again.", state=row.state)
    return row.store_upload


def _parts(store: ObjectStore, row: UploadRow) -> tuple[StoredPart, ...]:
    if row.state != "OPEN" or row.store_upload is None:
        return ()
    try:
        return store.list_parts(upload_key(row.id), row.store_upload)
    except object_store.NotFound:
        return ()


def _public(row: UploadRow, parts: tuple[StoredPart, ...]) -> UploadPublic:
    return UploadPublic(
        id=row.id,
        state=row.state,
        file=row.request["file"],
        num_bytes=row.num_bytes,
        sha256=row.sha256,
        part_bytes=row.part_bytes,
        num_parts=_num_parts(row),
        parts=tuple(PartPublic(number=part.number, num_bytes=part.size) for part in parts),
        job_id=row.job_id,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def _part_bytes(num_bytes: int) -> int:
    """The usual size, or whole MiB more where the file would need too many parts."""
    return max(PART_BYTES, -(-num_bytes // (MAX_PARTS * _MIB)) * _MIB)


def _num_parts(row: UploadRow) -> int:
    return -(-row.num_bytes // row.part_bytes)


def _size_of(row: UploadRow, number: int) -> int:
    return min(row.part_bytes, row.num_bytes - (number - 1) * row.part_bytes)
