"""Places in the queue: what the scheduler would decide on what it can see now, shared by all who ask meanwhile.

Deciding takes time in proportion to the jobs that wait; so the decisions are kept while the queue is the same (the same
jobs, none of them changed), for a second at most, since what runs and the cluster change too. To see that the queue is
the same takes such time, too, and is done only where anything at all has happened: what changes a job is in the events.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import bindparam, func, literal_column, select
from sqlalchemy.orm import Session

from configs.states import Desired, JobState
from orchestrator.control.queue_view import load_view
from orchestrator.control.scheduling import Start, Wait, schedule
from orchestrator.schemas import QueuePublic
from orchestrator.storage.tables import ClusterRow, EventRow, JobRow

KEPT_S = 1.0
NOT_LOOKED_AT = "The scheduler has not looked at it yet."


@dataclass(frozen=True)
class _Kept:
    newest: tuple[Any, ...]
    queue: tuple[Any, ...]
    at: float
    places: dict[str, QueuePublic]


_kept: dict[str, _Kept] = {}
"""By database."""
_deciding = threading.Lock()
# Made once: to put a statement together takes as long as to execute it.
_QUEUE = select(
    func.count(), func.sum(JobRow.version), func.count(JobRow.start_workers), func.max(JobRow.created_at)
).where(JobRow.state == JobState.QUEUED, JobRow.search_id.is_(None))
_NEWEST = select(
    select(func.max(EventRow.seq)).scalar_subquery(),
    select(ClusterRow.seen_at).where(ClusterRow.id == 1).scalar_subquery(),
    select(ClusterRow.reachable).where(ClusterRow.id == 1).scalar_subquery(),
)
"""Changes with every event, among them every change of a job that waits, and with every look at the cluster."""
_PRIORITY = bindparam("own_priority", type_=JobRow.priority.type)
_CREATED_AT = bindparam("own_created_at", type_=JobRow.created_at.type)
# Those of the same priority are counted in the index ix_jobs_waiting alone, however wide the rows are: that it holds
# all of them the databases know from literals, not from bound values.
_WAITING = select(func.count()).where(
    JobRow.state == literal_column(f"'{JobState.QUEUED}'"),
    JobRow.start_workers.is_(None),
    JobRow.desired == literal_column(f"'{Desired.RUN}'"),
    JobRow.search_id.is_(None),
)
BEFORE = select(
    _WAITING.where(JobRow.priority > _PRIORITY).scalar_subquery()
    + _WAITING.where(JobRow.priority == _PRIORITY, JobRow.created_at < _CREATED_AT).scalar_subquery()
).scalar_subquery()
"""How many jobs wait before one of `own_priority` that was created at `own_created_at`."""


def waits(row: JobRow) -> bool:
    """Whether a job waits for its turn. One that the scheduler has let go, or that is wanted paused or stopped, does
    not; nor does a trial, whose search begins it."""
    is_free = row.start_workers is None and row.search_id is None
    return row.state == JobState.QUEUED and is_free and row.desired == Desired.RUN


def find_places(session: Session, job_ids: Collection[str], kept_s: float = KEPT_S) -> dict[str, QueuePublic]:
    """The places of those of these jobs that wait, decided anew or within the last `kept_s` seconds."""
    if not job_ids:
        return {}
    database = str(session.connection().engine.url)
    newest = tuple(session.execute(_NEWEST).one())
    with _deciding:
        kept = _kept.get(database)
        is_new = kept is not None and time.monotonic() - kept.at <= kept_s
        if kept is None or not is_new or kept.newest != newest:
            queue = tuple(session.execute(_QUEUE).one())
            if kept is not None and is_new and kept.newest[1:] == newest[1:] and kept.queue == queue:
                kept = replace(kept, newest=newest)
            else:
                decisions = schedule(load_view(session, datetime.now(UTC)))
                places = {decision.job_id: _place(decision) for decision in decisions}
                kept = _Kept(newest, queue, time.monotonic(), places)
            _kept[database] = kept
    return {job_id: kept.places[job_id] for job_id in job_ids if job_id in kept.places}


def place_of_new(num_before: int) -> QueuePublic:
    """The place of a job that was queued just now, so many before it. Why it waits is for the scheduler to say."""
    return QueuePublic(position=num_before + 1, reason=None, message=NOT_LOOKED_AT)


def _place(decision: Start | Wait) -> QueuePublic:
    if isinstance(decision, Wait):
        return QueuePublic(position=decision.position, reason=decision.reason, message=decision.message)
    return QueuePublic(position=1, reason=None, message="There is room: it starts with the scheduler's next look.")
