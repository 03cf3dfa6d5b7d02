"""What happened to a job: its attempts and its events, as pages and as a stream to follow."""

from __future__ import annotations

from sqlalchemy import select

from configs.states import JobState
from orchestrator.schemas import AttemptPublic, EventPage, EventPublic
from orchestrator.services.jobs import find_job
from orchestrator.services.public import attempt_public, event_public
from orchestrator.services.streams import Batch, Item
from orchestrator.storage.db import Database
from orchestrator.storage.tables import AttemptRow, EventRow

_PAGE = 500


def list_attempts(db: Database, job_id: str) -> tuple[AttemptPublic, ...]:
    """The job's attempts by number. Raises NotFound."""
    with db.reader() as session:
        find_job(session, job_id)
        rows = session.scalars(select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.number))
        return tuple(attempt_public(row) for row in rows)


def list_events(db: Database, job_id: str, after: int, limit: int) -> EventPage:
    """The job's events with seq > `after`, the oldest first. Raises NotFound."""
    events, _ = _events_and_end(db, job_id, after, limit)
    return EventPage(items=events, next_after=events[-1].seq if events else after)


class EventFollower:
    """Yields a job's events from `after` on, until the job has ended and all were sent."""

    def __init__(self, db: Database, job_id: str, after: int) -> None:
        self.db = db
        self.job_id = job_id
        self.after = after

    def poll(self) -> Batch:
        """Events since the last poll. Blocks for one query."""
        events, ended = _events_and_end(self.db, self.job_id, self.after, _PAGE)
        if events:
            self.after = events[-1].seq
        items = [Item(id=str(event.seq), event=event.type, data=event.model_dump_json()) for event in events]
        full = len(events) == _PAGE
        return Batch(items=items, more=full, done=ended and not full)


def _events_and_end(db: Database, job_id: str, after: int, limit: int) -> tuple[tuple[EventPublic, ...], bool]:
    """Events, and whether the job had ended before they were read (then there are no more)."""
    with db.reader() as session:
        ended = JobState(find_job(session, job_id).state).is_terminal
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > after).order_by(EventRow.seq)
        return tuple(event_public(row) for row in session.scalars(query.limit(limit))), ended
