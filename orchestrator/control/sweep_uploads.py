"""The controller's sweep of uploads: what was abandoned, files that have been imported, images that have expired."""

from __future__ import annotations

from datetime import datetime, timedelta

import structlog
from sqlalchemy import delete, select

from configs.layout import image_key, upload_key, uploads_prefix
from configs.states import JobState
from orchestrator.storage.db import Database
from orchestrator.storage.store import ObjectStore
from orchestrator.storage.tables import ImageRow, JobRow, UploadRow

log = structlog.get_logger(__name__)


def sweep_uploads(db: Database, store: ObjectStore, now: datetime, expires_s: float) -> list[str]:
    """Abort uploads that have expired, and delete files whose job has succeeded, or ended long enough ago that nobody
    will retry it. Returns the ids of those swept.

    Raises:
        StoreError: the store failed on the way; the next call goes on with what is left.
    """
    with db.session() as session:
        expired = select(UploadRow).where(UploadRow.state == "OPEN", UploadRow.expires_at <= now).with_for_update()
        for row in session.scalars(expired):
            row.state = "ABORTED"
    swept = []
    for upload_id, name in _left_over(db, now):
        if name is not None:
            store.abort_upload(upload_key(upload_id), name)
        store.delete([upload_key(upload_id)])
        with db.session() as session:
            session.get_one(UploadRow, upload_id).deleted_at = now
        swept.append(upload_id)
    _abort_unknown(db, store, now - timedelta(seconds=expires_s))
    if swept:
        log.info("Uploads swept.", uploads=swept)
    return swept


def sweep_images(db: Database, store: ObjectStore, now: datetime) -> list[str]:
    """Delete images that have expired. Returns their ids.

    Raises:
        StoreError: the store failed; the next call tries again.
    """
    with db.reader() as session:
        expired = list(session.scalars(select(ImageRow.id).where(ImageRow.expires_at <= now).limit(1000)))
    if expired:
        store.delete([image_key(image_id) for image_id in expired])
        with db.session() as session:
            session.execute(delete(ImageRow).where(ImageRow.id.in_(expired)))
        log.info("Images swept.", count=len(expired))
    return expired


def _left_over(db: Database, now: datetime) -> list[tuple[str, str | None]]:
    """Uploads of which something may be left in the store that nobody needs."""
    with db.reader() as session:
        present = select(UploadRow, JobRow.state).outerjoin(JobRow, JobRow.id == UploadRow.job_id)
        rows = session.execute(present.where(UploadRow.deleted_at.is_(None), UploadRow.state != "OPEN")).all()
    return [
        (row.id, row.store_upload)
        for row, state in rows
        if row.state == "ABORTED"
        or state == JobState.SUCCEEDED
        or (state is not None and JobState(state).is_terminal and row.expires_at <= now)
    ]


def _abort_unknown(db: Database, store: ObjectStore, before: datetime) -> None:
    """Uploads that the store began and no row names: the process that began them died before it could note it."""
    begun = [(key, name) for key, name, at in store.open_uploads(uploads_prefix()) if at <= before]
    if not begun:
        return
    with db.reader() as session:
        known = set(session.scalars(select(UploadRow.store_upload).where(UploadRow.state == "OPEN")))
    for key, name in begun:
        if name not in known:
            store.abort_upload(key, name)
