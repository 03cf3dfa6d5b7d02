"""Write metrics on to a sink: what has arrived since the job's cursor, then move the cursor.

At least once: a cursor moves only after the sink has accepted, so whatever is cut off in between comes again, and sinks
take the same points twice without showing them twice. A sink that fails is left alone for a while, longer each time; a
job that it refuses is left alone by itself, so that it does not hold up others.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from configs.states import JobState
from orchestrator.control.sinks.sink import Delivery, Sink, SinkError, SinkJob, SinkUnavailable
from orchestrator.storage.arrivals import BEFORE_ALL, PAGE, last_valid_steps, read_arrivals, without_repeated
from orchestrator.storage.db import Database, is_unavailable
from orchestrator.storage.events import record
from orchestrator.storage.tables import AttemptRow, JobRow, SinkCursorRow, SinkRow

log = structlog.get_logger(__name__)
ACTOR = "sinks"
MAX_JOBS = 100
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
_MESSAGE_CHARS = 500


@dataclass(frozen=True)
class _Place:
    """A cursor as it was read: it is moved only if it is still there."""

    row: tuple[int, int, int] | None
    """Attempt, seq and generation of the row; None: there is none."""
    attempt: int
    seq: int
    generation: int
    max_step: int
    memory: Mapping[str, Any]


@dataclass(frozen=True)
class _Work:
    """A delivery, and where the cursor stands after it."""

    place: _Place
    delivery: Delivery
    attempt: int
    seq: int
    max_step: int
    more: bool


class Deliverer:
    """Writes to one sink. Used by one thread."""

    def __init__(self, db: Database, sink: Sink, page: int = PAGE) -> None:
        self._db, self._sink, self._page = db, sink, page
        self._failures = 0
        self._not_before: datetime | None = None

    def look(self, now: datetime, may_go_on: Callable[[], bool] = lambda: True) -> int:
        """Write what is due of every job, the newest first. Returns how many jobs were written to.

        A failing sink or job is noted (`sinks`, an event on the job), not raised.
        """
        if self._not_before is not None and now < self._not_before:
            return 0
        num_written = 0
        try:
            self._sink.prepare()
            for job_id in self._due(now):
                if not may_go_on():
                    break
                num_written += self._write_job(job_id, now, may_go_on)
        except SinkUnavailable as error:
            self._failures += 1
            self._not_before = now + pause(self._failures)
            self._note(now, self._clean(str(error)))
        else:
            self._failures, self._not_before = 0, None
            self._note(now, "")
        return num_written

    def _due(self, now: datetime) -> list[str]:
        """Jobs with reports that the cursor has not passed, or whose end is not written."""
        cursor, last = SinkCursorRow, AttemptRow
        is_behind = or_(
            cursor.job_id.is_(None),
            last.number > cursor.attempt,
            last.report_seq > cursor.seq,
            and_(JobRow.ended_at.is_not(None), cursor.done.is_(False)),
        )
        is_time = or_(
            cursor.written_at.is_(None),
            cursor.written_at <= now - timedelta(seconds=self._sink.every_s),
            JobRow.ended_at.is_not(None),
        )
        query = (
            select(JobRow.id)
            .join(last, and_(last.job_id == JobRow.id, last.number == JobRow.num_attempts))
            .outerjoin(cursor, and_(cursor.job_id == JobRow.id, cursor.sink == self._sink.name))
            .where(is_behind, is_time, or_(cursor.not_before.is_(None), cursor.not_before <= now))
            .order_by(JobRow.created_at.desc())
            .limit(MAX_JOBS)
        )
        with self._db.reader() as session:
            return list(session.scalars(query))

    def _write_job(self, job_id: str, now: datetime, may_go_on: Callable[[], bool]) -> bool:
        """Write all that the job has; whether it was possible. Raises SinkUnavailable."""
        more = True
        while more and may_go_on():
            try:
                more = self._write_once(job_id, now)
            except SinkUnavailable as error:
                self._fail(job_id, now, self._clean(str(error)), wait=False)
                raise
            except SinkError as error:
                self._fail(job_id, now, self._clean(str(error)), wait=True)
                return False
            except Exception as error:
                if is_unavailable(error):
                    raise
                # A sink's package may raise anything. One job's failure must not hold up the others.
                log.error("A sink failed.", sink=self._sink.name, job=job_id, trace=self._clean(traceback.format_exc()))
                self._fail(job_id, now, self._clean(f"{type(error).__name__}: {error}"), wait=True)
                return False
        return True

    def _write_once(self, job_id: str, now: datetime) -> bool:
        """Write a page and move the cursor; whether there is more."""
        with self._db.reader() as session:
            work = _next_work(session, job_id, self._sink, self._page)
        delivery = work.delivery
        memory = dict(delivery.memory)
        # A job that never measured anything is not told of.
        if delivery.points or (delivery.final and (memory or delivery.generation)):
            memory = self._sink.write(delivery)
        with self._db.session() as session:
            moved = _move_cursor(session, self._sink.name, work, memory, now)
        # Not moved: another controller was here. Whoever leads looks again.
        return moved and work.more

    def _fail(self, job_id: str, now: datetime, message: str, *, wait: bool) -> None:
        with self._db.session() as session:
            row = session.get(SinkCursorRow, (job_id, self._sink.name), with_for_update=True)
            if row is None:
                attempt, seq = BEFORE_ALL
                row = SinkCursorRow(job_id=job_id, sink=self._sink.name, attempt=attempt, seq=seq, failures=0)
                row.told = False
                session.add(row)
            row.failures += 1
            row.not_before = now + pause(row.failures) if wait else None
            was_told, row.told = row.told, True
            if not was_told:
                text = f"Metrics are not in {self._sink.name} yet, training goes on: {message}"
                record(session, job_id, "metrics.delayed", text, ACTOR, data={"sink": self._sink.name}, at=now)
        log.warning("Metrics not written.", sink=self._sink.name, job=job_id, detail=message)

    def _note(self, now: datetime, message: str) -> None:
        """Keep whether the sink works, for the API to show."""
        with self._db.session() as session:
            row = session.get(SinkRow, self._sink.name)
            if row is None:
                row = SinkRow(name=self._sink.name, ok=not message, message=message, since=now)
                session.add(row)
            if row.ok != (not message):
                row.ok, row.since = not message, now
                log.info("Sink works." if row.ok else "Sink fails.", sink=self._sink.name, detail=message)
            row.message, row.seen_at = message, now

    def _clean(self, text: str) -> str:
        for secret in self._sink.secrets:
            text = text.replace(secret, "***")
        return text if len(text) <= _MESSAGE_CHARS or "\n" in text else f"{text[:_MESSAGE_CHARS]}…"


def pause(failures: int) -> timedelta:
    """How long to leave alone what failed so often in a row."""
    return timedelta(seconds=min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10)))


def forget_other_sinks(db: Database, names: set[str]) -> None:
    """Drop the condition of sinks that are no longer configured. Their cursors stay: one that comes back goes on."""
    with db.session() as session:
        for row in session.scalars(select(SinkRow).where(SinkRow.name.not_in(names))):
            session.delete(row)


def _next_work(session: Session, job_id: str, sink: Sink, page: int) -> _Work:
    # Job and attempts before points: what comes in between is read too early, never missed.
    job = session.get_one(JobRow, job_id)
    attempts = session.scalars(select(AttemptRow).where(AttemptRow.job_id == job_id).order_by(AttemptRow.number)).all()
    from_steps = {attempt.number: attempt.from_step for attempt in attempts}
    last = attempts[-1]
    place = _place(session.get(SinkCursorRow, (job_id, sink.name)))
    if not sink.takes_back:
        place = _started_over(place, from_steps)
    points, more = read_arrivals(session, job_id, (place.attempt, place.seq), last.number, page)
    end = points[-1].place if more else max([(last.number, last.report_seq), *(point.place for point in points)])
    counted = points
    if not sink.takes_back:
        limits = last_valid_steps(from_steps)
        counted = tuple(p for p in points if (limit := limits[p.attempt]) is None or p.step <= limit)
    counted = without_repeated(session, job_id, counted, from_steps)
    delivery = Delivery(
        job=_job(job),
        points=counted,
        from_steps=from_steps,
        memory=place.memory,
        generation=place.generation,
        final=JobState(job.state).is_terminal and not more,
    )
    max_step = max([place.max_step, *(point.step for point in counted)])
    return _Work(place, delivery, *end, max_step=max_step, more=more)


def _place(row: SinkCursorRow | None) -> _Place:
    if row is None:
        return _Place(None, *BEFORE_ALL, generation=0, max_step=0, memory={})
    return _Place(
        (row.attempt, row.seq, row.generation), row.attempt, row.seq, row.generation, row.max_step, row.memory
    )


def _started_over(place: _Place, from_steps: Mapping[int, int]) -> _Place:
    """`place`, or the beginning of another generation if steps that were written have since been rolled back."""
    kept = min((step for attempt, step in from_steps.items() if attempt > place.attempt), default=None)
    if place.attempt == BEFORE_ALL[0] or kept is None or place.max_step <= kept:
        return place
    return _Place(place.row, *BEFORE_ALL, generation=place.generation + 1, max_step=0, memory={})


def _job(row: JobRow) -> SinkJob:
    return SinkJob(
        id=row.id,
        name=row.name,
        kind=row.kind,
        project=row.project,
        labels={key: str(value) for key, value in row.labels.items()},
        state=JobState(row.state),
        reason=row.reason,
        spec_json=row.spec_json,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )


def _move_cursor(session: Session, sink: str, work: _Work, memory: dict[str, Any], now: datetime) -> bool:
    """Move the cursor behind `work`; False if it was moved by another process meanwhile."""
    before, job_id = work.place, work.delivery.job.id
    row = session.get(SinkCursorRow, (job_id, sink), with_for_update=True)
    if before.row != (None if row is None else (row.attempt, row.seq, row.generation)):
        return False
    if row is None:
        row = SinkCursorRow(job_id=job_id, sink=sink, told=False)
        session.add(row)
    row.attempt, row.seq, row.max_step = work.attempt, work.seq, work.max_step
    row.generation, row.memory = before.generation, memory
    row.failures, row.not_before, row.written_at = 0, None, now
    row.done = work.delivery.final
    if row.told and row.done:
        row.told = False
        record(session, job_id, "metrics.delivered", f"All metrics are in {sink}", ACTOR, data={"sink": sink}, at=now)
    return True
