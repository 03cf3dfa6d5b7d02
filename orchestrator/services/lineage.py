"""What jobs came of: retries, forks and the weights they started from, in both directions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Literal

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from orchestrator.services.jobs import find_job
from orchestrator.storage.db import Database
from orchestrator.storage.tables import CheckpointRow, JobRow
from orchestrator.view_schemas import LineageJob, LineageLink, LineagePublic

MAX_JOBS = 100


def read_lineage(db: Database, job_id: str, max_jobs: int = MAX_JOBS) -> LineagePublic:
    """The job's family: whatever it came of, whatever came of it, and so on, the nearest `max_jobs`. Trials are their
    search's and left out.

    Raises:
        NotFound: there is no such job.
    """
    with db.reader() as session:
        first = find_job(session, job_id)
        found, waiting, complete = {first.id: first}, deque([first]), True
        links: dict[tuple[str, str], LineageLink] = {}
        while waiting:
            row = waiting.popleft()
            for link, other in _neighbours(session, row):
                if other.id not in found:
                    if len(found) == max_jobs:
                        complete = False
                        continue
                    found[other.id] = other
                    waiting.append(other)
                links[link.source, link.target] = link
        rows = sorted(found.values(), key=lambda row: (row.created_at, row.id))
        return LineagePublic(jobs=tuple(map(_public, rows)), links=tuple(links.values()), complete=complete)


def job_of(reference: str) -> str:
    """The job of a checkpoint's id, of job_…/best, or the job itself."""
    return f"job_{reference.split('_')[1]}" if reference.startswith("ckpt_") else reference.partition("/")[0]


def _neighbours(session: Session, row: JobRow) -> Iterator[tuple[LineageLink, JobRow]]:
    """The jobs that this one was made of, then those made of it."""
    for link in _origins(row):
        source = session.get(JobRow, link.source)
        if source is not None:
            yield link, source
    checkpoints = select(CheckpointRow.id).where(CheckpointRow.job_id == row.id)
    aliases = [f"{row.id}/best", f"{row.id}/latest"]
    for made_of in (
        JobRow.retry_of == row.id,
        JobRow.resume_from.in_(checkpoints),
        or_(JobRow.init_from.in_(checkpoints), JobRow.init_from.in_(aliases)),
    ):
        # One more than are shown says whether there are more.
        query = select(JobRow).where(made_of, JobRow.search_id.is_(None)).order_by(JobRow.id).limit(MAX_JOBS + 1)
        for other in session.scalars(query):
            for link in _origins(other):
                if link.source == row.id:
                    yield link, other


def _origins(row: JobRow) -> Iterator[LineageLink]:
    """What a job says of where it comes from; of what it took from one job the closest."""
    said: tuple[tuple[str | None, Literal["weights", "fork", "retry"]], ...] = (
        (row.init_from, "weights"),
        (row.resume_from, "fork"),
        (row.retry_of, "retry"),
    )
    links: dict[str, LineageLink] = {}
    for reference, how in said:
        if reference is not None:
            source = job_of(reference)
            checkpoint = reference if reference.startswith("ckpt_") else None
            if how == "retry" and source in links:
                checkpoint = links[source].checkpoint
            links[source] = LineageLink(source=source, target=row.id, how=how, checkpoint=checkpoint)
    yield from links.values()


def _public(row: JobRow) -> LineageJob:
    return LineageJob(
        id=row.id, name=row.name, kind=row.kind, state=row.state, step=row.step, created_at=row.created_at
    )
