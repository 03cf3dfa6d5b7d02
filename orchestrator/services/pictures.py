"""The pictures of an inspect job. Files are those that its index names, and no others."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from configs.layout import picture_index_key, pictures_prefix
from configs.wire import PictureFile, PictureIndex
from orchestrator.schemas import PicturePage
from orchestrator.services.jobs import find_job
from orchestrator.services.problems import NotFound, Unavailable
from orchestrator.storage import store as object_store
from orchestrator.storage.db import Database
from orchestrator.storage.store import ObjectStore

MEDIA_TYPES = {"png": "image/png", "npz": "application/octet-stream"}


def list_pictures(db: Database, store: ObjectStore, job_id: str) -> PicturePage:
    """What the job drew; nothing while it has not succeeded, or is of another kind. Raises NotFound."""
    index, _ = _index(db, store, job_id)
    if index is None:
        return PicturePage(checkpoint_id=None, items=())
    return PicturePage(checkpoint_id=index.checkpoint_id, items=index.pictures)


def picture_file(db: Database, store: ObjectStore, job_id: str, name: str) -> tuple[PictureFile, Iterator[bytes]]:
    """A picture or its numbers: the file, and its bytes in chunks.

    Raises:
        NotFound: there is no such job or file.
    """
    index, kind = _index(db, store, job_id)
    if index is None:
        raise NotFound(
            f"Job {job_id} has no pictures: it is of kind {kind}.",
            hint="An inspect job leaves them when it has succeeded.",
        )
    files = {file.name: file for picture in index.pictures for file in (picture.image, picture.numbers)}
    if name not in files:
        raise NotFound(f"Job {job_id} has no picture {name!r}: it has {', '.join(files)}.")
    try:
        return files[name], store.stream(pictures_prefix(job_id) + name)
    except object_store.NotFound:
        raise NotFound(f"{name} is gone from the object store.") from None


def media_type(name: str) -> str:
    """Of a file of that name."""
    return MEDIA_TYPES[name.rpartition(".")[2]]


def _index(db: Database, store: ObjectStore, job_id: str) -> tuple[PictureIndex | None, str]:
    """What the job drew, and its kind."""
    with db.reader() as session:
        kind = find_job(session, job_id).kind
    key = picture_index_key(job_id)
    try:
        return PictureIndex.model_validate_json(store.get(key)), kind
    except object_store.NotFound:
        return None, kind
    except ValidationError as error:
        raise Unavailable(f"{key} cannot be read: {error.error_count()} fields are not as they should be.") from None
