"""Jobs as users see and steer them: get, list, cancel, pause, resume. (Submitting and retrying: `submission`.)

Users write `desired` only; the reconciler turns it into a state.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

from pydantic_core import to_json
from sqlalchemy import Row, Select, Text, and_, bindparam, func, or_, select
from sqlalchemy import cast as cast_to
from sqlalchemy.orm import InstrumentedAttribute, Session

from configs.ids import JOB_ID
from configs.states import Desired, JobState
from orchestrator.control.transitions import allowed_actions
from orchestrator.schemas import JobPage, JobPublic, QueuePublic
from orchestrator.services.auth import Actor
from orchestrator.services.idempotency import Answer, Key, claim, remember
from orchestrator.services.places import find_places, place_of_new, waits
from orchestrator.services.problems import Invalid, NotFound, PreconditionFailed, WrongState, field_error
from orchestrator.services.public import StoredJson, etag, job_json, job_public
from orchestrator.storage.db import Database
from orchestrator.storage.events import lock_job, record
from orchestrator.storage.not_indexed import not_indexed
from orchestrator.storage.tables import AttemptRow, JobRow

Sort = Literal["-created", "created", "-priority", "priority", "name", "-name"]
_SORTS: dict[str, InstrumentedAttribute[Any]] = {
    "created": JobRow.created_at,
    "priority": JobRow.priority,
    "name": JobRow.name,
}


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list. An empty field does not filter."""

    states: tuple[str, ...] = ()
    kind: str | None = None
    project: str | None = None
    name: str | None = None
    """A part of the name, in any case."""
    labels: tuple[str, ...] = ()
    """Each `key=value`."""
    search: str | None = None
    """The trials of this search; None: jobs that are no trials."""


def find_job(session: Session, job_id: str) -> JobRow:
    """The job's row.

    Raises:
        NotFound: there is no such job.
    """
    row = session.get(JobRow, job_id) if JOB_ID.match(job_id) else None
    if row is None:
        raise _no_job(job_id)
    return row


def _no_job(job_id: str) -> NotFound:
    return NotFound(f"There is no job {job_id!r}.", hint="`patchwork list` shows the jobs there are.")


def get_job(db: Database, job_id: str) -> JobPublic:
    """Raises NotFound."""
    with db.reader() as session:
        return publish(session, [find_job(session, job_id)])[0]


def get_job_json(db: Database, job_id: str) -> tuple[bytes, str]:
    """The JSON of what `get_job` returns, and its ETag. Raises NotFound."""
    with db.reader() as session:
        rows = session.execute(_BY_ID, {"job_id": job_id}).all() if JOB_ID.match(job_id) else []
        if not rows:
            raise _no_job(job_id)
        [document] = _write(session, rows)
    return document, etag(cast(JobRow, rows[0]))


def list_jobs(db: Database, wanted: JobFilter, limit: int, cursor: str | None, sort: Sort = "-created") -> JobPage:
    """A page of jobs, the newest first or as `sort` says.

    Raises:
        Invalid: the cursor or a label filter is malformed, or the cursor belongs to another order.
    """
    with db.reader() as session:
        rows: list[JobRow] = list(session.scalars(_page(session, [JobRow], wanted, limit, cursor, sort)))
        items = publish(session, rows[:limit])
    return JobPage(items=tuple(items), next_cursor=_next_cursor(rows, limit, sort))


def list_jobs_json(
    db: Database,
    wanted: JobFilter,
    limit: int,
    cursor: str | None,
    sort: Sort = "-created",
    num_matching: int | None = None,
) -> bytes:
    """The JSON of what `list_jobs` returns, with `num_matching` in it, in about half the time.

    Raises:
        Invalid: as `list_jobs`.
    """
    with db.reader() as session:
        rows = session.execute(_page(session, _WRITTEN, wanted, limit, cursor, sort)).all()
        items = _write(session, rows[:limit])
    next_cursor = _next_cursor(cast(Sequence[JobRow], rows), limit, sort)
    rest = to_json({"next_cursor": next_cursor, "num_matching": num_matching})
    return b'{"items":[%b],%b' % (b",".join(items), rest[1:])


def count_jobs(db: Database, wanted: JobFilter) -> int:
    """How many jobs there are of these. Raises Invalid: a label filter is malformed."""
    with db.reader() as session:
        return session.scalar(_filtered(wanted).with_only_columns(func.count(JobRow.id))) or 0


def cancel_job(db: Database, actor: Actor, job_id: str, if_match: str | None = None) -> JobPublic:
    """Ask for the job's end; asking again changes nothing.

    Raises:
        NotFound, PreconditionFailed, WrongState: it has ended.
    """
    return _desire(db, actor, job_id, Desired.STOP, "cancel", if_match)


def pause_job(db: Database, actor: Actor, job_id: str, if_match: str | None = None) -> JobPublic:
    """Ask the job to save a checkpoint and leave its workers until it is resumed.

    Raises:
        NotFound, PreconditionFailed, WrongState: it cannot be paused now.
    """
    return _desire(db, actor, job_id, Desired.PAUSE, "pause", if_match)


def resume_job(
    db: Database, actor: Actor, job_id: str, if_match: str | None = None, key: Key | None = None
) -> JobPublic:
    """Let a paused job back into the queue. Asked again with the same `key`, it changes nothing: who did not hear the
    answer may ask once more, though by then the job is not paused any more.

    Raises:
        NotFound, PreconditionFailed, KeyReused, WrongState: it is not paused.
    """
    return _desire(db, actor, job_id, Desired.RUN, "resume", if_match, key)


def check_version(row: JobRow, if_match: str | None) -> None:
    """Raises PreconditionFailed: the job is not the version that the client has seen."""
    if if_match is not None and if_match.strip() not in ("*", etag(row)):
        raise PreconditionFailed(
            f"The job has changed: its ETag is {etag(row)}, If-Match says {if_match}.",
            hint="Get the job again first.",
        )


def check_action(row: JobRow, action: str) -> None:
    """Raises WrongState, with the job's state and what is allowed in it."""
    allowed = allowed_actions(row)
    if action not in allowed:
        raise WrongState(
            f"The job is {row.state} ({row.desired} is desired): it cannot {action} now.",
            hint=f"Allowed now: {', '.join(allowed) or 'nothing'}.",
            state=row.state,
            allowed_actions=allowed,
        )


def publish(session: Session, rows: Sequence[JobRow]) -> list[JobPublic]:
    """Public models of `rows`, with their attempts and places in the queue."""
    attempts, places = _attempts_and_places(session, rows)
    return [job_public(row, attempts.get(row.id, ()), places.get(row.id)) for row in rows]


def new_job_json(row: JobRow, num_before: int) -> bytes:
    """The JSON of the public model of a job that was queued just now, so many before it."""
    stored = StoredJson(to_json(row.labels), to_json(row.submitted), to_json(row.plan), to_json(row.last_metrics))
    return job_json(row, stored, (), place_of_new(num_before))


def _attempts_and_places(
    session: Session, rows: Sequence[JobRow]
) -> tuple[dict[str, list[AttemptRow]], dict[str, QueuePublic]]:
    """By job: the attempts, by number, of those that have any, and the places of those that wait."""
    attempts: dict[str, list[AttemptRow]] = {}
    if begun := [row.id for row in rows if row.num_attempts]:
        of_these = select(AttemptRow).where(AttemptRow.job_id.in_(begun)).order_by(AttemptRow.number)
        for attempt in session.scalars(of_these):
            attempts.setdefault(attempt.job_id, []).append(attempt)
    return attempts, find_places(session, {row.id for row in rows if waits(row)})


# What the JSON of a job is made of: its columns but for those that stay inside, and those that are JSON as they are.
_INSIDE = {"dataset", "not_before", "user_failures", "infra_failures", "next_look_at"}
_AS_STORED = ("labels", "submitted", "plan", "last_metrics")
_SHOWN = [
    column
    for column in JobRow.__table__.columns
    if column.key not in {*_INSIDE, *_AS_STORED} and not column.key.startswith("lease_")
]
_WRITTEN = [*_SHOWN, *(cast_to(getattr(JobRow, name), Text).label(f"{name}_json") for name in _AS_STORED)]
_BY_ID = select(*_WRITTEN).where(JobRow.id == bindparam("job_id"))


def _write(session: Session, found: Sequence[Row[Any]]) -> list[bytes]:
    """The JSON of the public models of rows of `_WRITTEN`."""
    # They answer to the same names as a JobRow; for its JSON nobody but `_stored` asks them.
    rows = cast(Sequence[JobRow], found)
    attempts, places = _attempts_and_places(session, rows)
    return [job_json(row, _stored(row), attempts.get(row.id, ()), places.get(row.id)) for row in rows]


def _stored(row: Any) -> StoredJson:
    return StoredJson(
        row.labels_json.encode(), row.submitted_json.encode(), row.plan_json.encode(), row.last_metrics_json.encode()
    )


_EVENTS = {
    Desired.STOP: ("job.cancel_requested", "Cancellation was asked for"),
    Desired.PAUSE: ("job.pause_requested", "A pause was asked for"),
    Desired.RUN: ("job.resume_requested", "The job was resumed"),
}


def _desire(
    db: Database,
    actor: Actor,
    job_id: str,
    desired: Desired,
    action: str,
    if_match: str | None,
    key: Key | None = None,
) -> JobPublic:
    with db.session() as session:
        find_job(session, job_id)
        if claim(session, key) is not None:
            return publish(session, [find_job(session, job_id)])[0]
        row = lock_job(session, job_id)
        assert row is not None, "jobs are never deleted"
        check_version(row, if_match)
        is_live = not JobState(row.state).is_terminal
        if not (is_live and row.desired == desired and desired is not Desired.RUN):
            check_action(row, action)
            row.desired = desired
            row.version += 1
            row.next_look_at = datetime.now(UTC)
            type_, message = _EVENTS[desired]
            record(session, job_id, type_, message, actor.name)
        # The answer itself is not kept: what the job is now says more.
        remember(session, key, Answer(202, b""))
        return publish(session, [row])[0]


def _filtered(wanted: JobFilter) -> Select[Any]:
    query = select(JobRow).where(JobRow.search_id == wanted.search)
    if wanted.states:
        query = query.where(not_indexed(JobRow.state).in_(wanted.states))
    if wanted.kind is not None:
        query = query.where(JobRow.kind == wanted.kind)
    if wanted.project is not None:
        query = query.where(JobRow.project == wanted.project)
    if wanted.name:
        query = query.where(JobRow.name.icontains(wanted.name, autoescape=True))
    for label in wanted.labels:
        key, equals, value = label.partition("=")
        if not key or not equals or '"' in key or "\\" in key:
            raise Invalid("The label filter is not valid.", errors=[field_error("/label", "expected key=value", label)])
        query = query.where(JobRow.labels[key].as_string() == value)
    return query


def _page(
    session: Session, shown: Sequence[Any], wanted: JobFilter, limit: int, cursor: str | None, sort: Sort
) -> Select[Any]:
    """The statement for `shown` of the jobs on a page, and of one more if there is a next page."""
    column, descending = _SORTS[sort.removeprefix("-")], sort.startswith("-")
    order = (column.desc(), JobRow.id.desc()) if descending else (column.asc(), JobRow.id.asc())
    query = _filtered(wanted).order_by(*order).limit(limit + 1)
    if cursor is not None:
        value, job_id = _parse_cursor(cursor, sort)
        beyond = column < value if descending else column > value
        id_beyond = JobRow.id < job_id if descending else JobRow.id > job_id
        query = query.where(or_(beyond, and_(column == value, id_beyond)))
    if wanted == JobFilter() and column is JobRow.created_at:
        return query.with_only_columns(*shown)
    # Ids first: rows are wide, and most of those that are looked at are not shown.
    chosen = list(session.scalars(query.with_only_columns(JobRow.id)))
    return select(*shown).where(JobRow.id.in_(chosen)).order_by(*order)


def _next_cursor(rows: Sequence[JobRow], limit: int, sort: Sort) -> str | None:
    """The cursor behind the last row of a page, of which `rows` holds one more if there is a next one."""
    if len(rows) <= limit:
        return None
    row = rows[limit - 1]
    value = {"created": row.created_at.isoformat(), "priority": row.priority, "name": row.name}[sort.removeprefix("-")]
    return base64.urlsafe_b64encode(json.dumps([sort, value, row.id]).encode()).decode()


def _parse_cursor(cursor: str, sort: Sort) -> tuple[Any, str]:
    """The place that a cursor of this order names. Raises Invalid."""
    try:
        made_for, value, job_id = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
        if sort.removeprefix("-") == "created":
            value = datetime.fromisoformat(value)
    except (binascii.Error, UnicodeError, ValueError, TypeError, RecursionError):
        raise _bad_cursor(cursor) from None
    kind = {"created": datetime, "priority": int, "name": str}[sort.removeprefix("-")]
    if made_for != sort or not isinstance(value, kind) or not isinstance(job_id, str) or not JOB_ID.match(job_id):
        raise _bad_cursor(cursor)
    if (isinstance(value, datetime) and value.tzinfo is None) or (isinstance(value, int) and abs(value) > 10**6):
        raise _bad_cursor(cursor)
    return value, job_id


def _bad_cursor(cursor: str) -> Invalid:
    return Invalid(
        "The cursor is not one of ours.", errors=[field_error("/cursor", "give next_cursor as it came", cursor)]
    )
