"""A job's event files for TensorBoard, as the controller writes them (`orchestrator.control.sinks.tensorboard`)."""

from __future__ import annotations

from collections.abc import Iterator

from configs.layout import tensorboard_prefix
from orchestrator.schemas import EventFilePage, FilePublic
from orchestrator.services.jobs import find_job
from orchestrator.services.problems import NotFound
from orchestrator.storage import store as object_store
from orchestrator.storage.db import Database
from orchestrator.storage.store import ObjectStore


def list_event_files(db: Database, store: ObjectStore, job_id: str) -> EventFilePage:
    """The files there are, in the order in which TensorBoard reads them. Raises NotFound."""
    with db.reader() as session:
        find_job(session, job_id)
    prefix = tensorboard_prefix(job_id)
    files = sorted((item.key.removeprefix(prefix), item.size) for item in store.list(prefix))
    return EventFilePage(items=tuple(FilePublic(name=name, num_bytes=size) for name, size in files))


def event_file(db: Database, store: ObjectStore, job_id: str, name: str) -> tuple[int, Iterator[bytes]]:
    """A file's length as of now, and so many bytes of it: it may grow while it is read.

    Raises:
        NotFound: there is no such job or file.
    """
    sizes = {file.name: file.num_bytes for file in list_event_files(db, store, job_id).items}
    if name not in sizes:
        raise NotFound(f"Job {job_id} has no event file {name!r}.", hint="GET .../tensorboard lists them.")
    try:
        return sizes[name], store.stream(tensorboard_prefix(job_id) + name, 0, sizes[name])
    except object_store.NotFound:
        raise NotFound(f"{name} is gone from the object store.") from None
