from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from configs.ids import new_upload_id
from configs.layout import image_key, upload_key
from configs.states import JobState
from orchestrator.control.sweep_uploads import sweep_images, sweep_uploads
from orchestrator.storage.db import Database
from orchestrator.storage.tables import ImageRow, JobRow, UploadRow
from tests.factories import NOW, add_job
from tests.fakes.memory_store import MemoryStore

pytestmark = pytest.mark.db
DAY_S = 24 * 3600.0


def add_upload(db: Database, store: MemoryStore, expires_in_s: float, job: JobRow | None = None) -> UploadRow:
    """An open upload with one part; with a job, a complete one whose file lies in the store."""
    upload_id = new_upload_id()
    name = store.create_upload(upload_key(upload_id))
    store.put_part(upload_key(upload_id), name, 1, b"abc")
    if job is not None:
        store.complete_upload(upload_key(upload_id), name, store.list_parts(upload_key(upload_id), name))
    row = UploadRow(
        id=upload_id,
        state="OPEN" if job is None else "COMPLETED",
        request={},
        sha256="0" * 64,
        num_bytes=3,
        part_bytes=3,
        store_upload=name,
        job_id=None if job is None else job.id,
        token_id="tok",
        created_at=NOW,
        expires_at=NOW + timedelta(seconds=expires_in_s),
    )
    with db.session() as session:
        session.add(row)
    return row


def test_an_upload_that_nobody_completed_is_aborted_once_it_has_expired(db: Database) -> None:
    store = MemoryStore()
    store.upload_began = NOW
    old, young = add_upload(db, store, -1.0), add_upload(db, store, 60.0)
    assert sweep_uploads(db, store, NOW, DAY_S) == [old.id]
    assert list(store.uploads) == [(upload_key(young.id), young.store_upload)]
    with db.reader() as session:
        assert (session.get_one(UploadRow, old.id).state, session.get_one(UploadRow, young.id).state) == (
            "ABORTED",
            "OPEN",
        )
    assert sweep_uploads(db, store, NOW, DAY_S) == []


@pytest.mark.parametrize(
    ("state", "expires_in_s", "is_kept"),
    [
        (JobState.SUCCEEDED, 60.0, False),
        (JobState.RUNNING, -1.0, True),
        (JobState.FAILED, 60.0, True),  # it may be retried
        (JobState.FAILED, -1.0, False),
    ],
)
def test_a_file_goes_when_nobody_needs_it(db: Database, state: JobState, expires_in_s: float, is_kept: bool) -> None:
    store = MemoryStore()
    job = add_job(db)
    with db.session() as session:
        session.get_one(JobRow, job.id).state = state
    upload = add_upload(db, store, expires_in_s, job)
    sweep_uploads(db, store, NOW, DAY_S)
    assert (upload_key(upload.id) in store.objects) == is_kept


def test_an_upload_that_no_row_names_is_aborted_after_a_while(db: Database) -> None:
    store = MemoryStore()
    store.create_upload(upload_key(new_upload_id()))
    store.upload_began = NOW
    sweep_uploads(db, store, NOW + timedelta(seconds=DAY_S - 1), DAY_S)
    assert store.uploads
    sweep_uploads(db, store, NOW + timedelta(seconds=DAY_S + 1), DAY_S)
    assert not store.uploads


def test_images_are_deleted_once_they_have_expired(db: Database) -> None:
    store = MemoryStore()
    for image_id, expires_in_s in (("img_old", -1.0), ("img_young", 60.0)):
        store.put(image_key(image_id), b"an image")
        row = {"num_bytes": 8, "media_type": "image/png", "created_at": NOW}
        with db.session() as session:
            session.add(ImageRow(id=image_id, expires_at=NOW + timedelta(seconds=expires_in_s), **row))
    assert sweep_images(db, store, NOW) == ["img_old"]
    assert sweep_images(db, store, NOW) == []
    assert [found.key for found in store.list("images/")] == [image_key("img_young")]
    with db.reader() as session:
        assert session.scalars(select(ImageRow.id)).all() == ["img_young"]
