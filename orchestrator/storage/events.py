"""The event log: what happened to a job, past tense, with who did it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from orchestrator.storage.tables import EventRow, JobRow

SCHEDULER = "scheduler"
RECONCILER = "reconciler"
_FIRST = insert(EventRow.__table__).inline()  # type: ignore[arg-type]


def record(
    session: Session,
    job_id: str | None,
    type: str,
    message: str,
    actor: str,
    attempt: int | None = None,
    data: dict[str, Any] | None = None,
    at: datetime | None = None,
) -> EventRow:
    """Add an event to this transaction and return it, its `seq` assigned.

    The job's row is locked first. PostgreSQL hands out sequence numbers before commit: without the lock a reader who
    follows a job's events by `seq` could see 8 before 7 is committed, and never 7.
    """
    if job_id is not None:
        lock_job(session, job_id)
    row = EventRow(
        job_id=job_id,
        attempt=attempt,
        type=type,
        message=message,
        actor=actor,
        data=data or {},
        at=at or datetime.now(UTC),
    )
    session.add(row)
    session.flush()
    return row


def record_first(session: Session, job_id: str, type: str, message: str, actor: str, at: datetime) -> None:
    """Add the event of a job that was made in this transaction: nobody else sees it, so nothing is locked. Without the
    ORM's objects, which cost more than the statement: jobs are submitted by the thousand."""
    row = {"job_id": job_id, "type": type, "message": message, "actor": actor, "data": {}, "at": at}
    session.connection().execute(_FIRST, row)


def lock_job(session: Session, job_id: str) -> JobRow | None:
    """The job's row, locked until the transaction ends (PostgreSQL; on SQLite the whole transaction already is).

    Every transaction that writes to a job or its attempts takes this lock first: one order, no deadlocks.
    """
    # What this session has changed but not sent is flushed before the select, so refreshing the row loses nothing.
    statement = select(JobRow).where(JobRow.id == job_id).with_for_update().execution_options(populate_existing=True)
    return session.scalars(statement).one_or_none()
