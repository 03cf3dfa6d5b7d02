"""The life of a job, and the one function that writes `JobRow.state`.

1. `enqueue` puts a validated job into the table: QUEUED.
2. The reconciler launches an attempt: PREPARING, until every rank has reported: RUNNING.
3. An attempt that is lost leaves the job RECOVERING, its workers still reserved, until the next attempt's ranks have
   reported (RUNNING) or the cluster has no room for it (QUEUED).
4. `desired` = pause or yield: PAUSING until the attempt has saved and left, then PAUSED or QUEUED again.
   `desired` = stop, or the deadline: STOPPING, then CANCELLED or FAILED.
5. SUCCEEDED, FAILED and CANCELLED are final.

Users and the scheduler write `desired`; only the reconciler moves the state.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ScalarSelect
from sqlalchemy.orm import Session

from configs.states import Desired, JobState
from orchestrator.storage.events import lock_job, record, record_first
from orchestrator.storage.insert import insert_row
from orchestrator.storage.tables import JobRow


class JobEvent(StrEnum):
    """What may happen to a job."""

    LAUNCH = "launch"
    """An attempt was written down and is about to be submitted."""
    READY = "ready"
    """Every rank has reported, or a pause was withdrawn before the attempt left."""
    LOSE = "lose"
    """The attempt ended and another one will follow, on the reserved workers."""
    REQUEUE = "requeue"
    """Back into the queue: preempted, resumed by the user, or no room left to recover."""
    PAUSE = "pause"
    """A pause or preemption was asked for."""
    PARK = "park"
    """Nothing of the job runs any more, and the user wants it paused."""
    STOP = "stop"
    """A cancellation was asked for, or the deadline passed."""
    SUCCEED = "succeed"
    FAIL = "fail"
    CANCEL = "cancel"


_Q, _PREP, _RUN, _REC = JobState.QUEUED, JobState.PREPARING, JobState.RUNNING, JobState.RECOVERING
_PAUSING, _PAUSED, _STOPPING = JobState.PAUSING, JobState.PAUSED, JobState.STOPPING
_LIVE = (_PREP, _RUN, _REC, _PAUSING, _STOPPING)

TRANSITIONS: dict[tuple[JobState, JobEvent], JobState] = {
    (_Q, JobEvent.LAUNCH): _PREP,
    (_PREP, JobEvent.READY): _RUN,
    (_REC, JobEvent.READY): _RUN,
    (_PAUSING, JobEvent.READY): _RUN,
    (_PREP, JobEvent.LOSE): _REC,
    (_RUN, JobEvent.LOSE): _REC,
    (_PAUSING, JobEvent.LOSE): _REC,
    (_PREP, JobEvent.REQUEUE): _Q,
    (_RUN, JobEvent.REQUEUE): _Q,
    (_REC, JobEvent.REQUEUE): _Q,
    (_PAUSING, JobEvent.REQUEUE): _Q,
    (_PAUSED, JobEvent.REQUEUE): _Q,
    (_PREP, JobEvent.PAUSE): _PAUSING,
    (_RUN, JobEvent.PAUSE): _PAUSING,
    (_REC, JobEvent.PAUSE): _PAUSING,
    (_Q, JobEvent.PARK): _PAUSED,
    (_PREP, JobEvent.PARK): _PAUSED,
    (_RUN, JobEvent.PARK): _PAUSED,
    (_REC, JobEvent.PARK): _PAUSED,
    (_PAUSING, JobEvent.PARK): _PAUSED,
    (_PREP, JobEvent.STOP): _STOPPING,
    (_RUN, JobEvent.STOP): _STOPPING,
    (_REC, JobEvent.STOP): _STOPPING,
    (_PAUSING, JobEvent.STOP): _STOPPING,
    **{(state, JobEvent.SUCCEED): JobState.SUCCEEDED for state in _LIVE},
    **{(state, JobEvent.FAIL): JobState.FAILED for state in (_Q, *_LIVE)},
    **{(state, JobEvent.CANCEL): JobState.CANCELLED for state in (_Q, _PAUSED, *_LIVE)},
}
"""Every (state, event) pair that is not here is illegal."""


class IllegalTransition(Exception):
    """A state change the table does not allow: a fault of ours."""

    def __init__(self, job_id: str, state: str, to: str) -> None:
        super().__init__(f"job {job_id}: no transition from {state} to {to}")


def successors(state: JobState) -> frozenset[JobState]:
    """The states a job in `state` may move to."""
    return frozenset(to for (origin, _), to in TRANSITIONS.items() if origin is state)


def enqueue(
    session: Session, job: JobRow, *, actor: str, at: datetime | None = None, asked: ScalarSelect[Any] | None = None
) -> Any:
    """Add a new job to this transaction: QUEUED, with its event. The row is flushed. Returns what is `asked` of the
    database about a job of `own_priority` and `own_created_at`, before this one is there."""
    at = at or datetime.now(UTC)
    job.state = JobState.QUEUED
    job.desired = Desired.RUN
    job.state_since = at
    job.created_at = job.created_at or at
    own = {} if asked is None else {"own_priority": job.priority, "own_created_at": job.created_at}
    answer = insert_row(session, job, asked, **own)
    message = f"{job.kind} job {job.name!r} was submitted"
    record_first(session, job.id, "job.queued", message, actor, at)
    return answer


def transition(
    session: Session,
    job: JobRow,
    to: JobState,
    *,
    reason: str | None = None,
    message: str = "",
    actor: str,
    attempt: int | None = None,
    data: dict[str, Any] | None = None,
    at: datetime | None = None,
) -> None:
    """Move `job` to `to` and record the event, in this transaction. The only writer of `JobRow.state`.

    Raises:
        IllegalTransition: the table has no such change; nothing was changed.
    """
    lock_job(session, job.id)
    state = JobState(job.state)
    if to not in successors(state):
        raise IllegalTransition(job.id, state, to)
    at = at or datetime.now(UTC)
    job.state = to
    job.reason = reason
    job.message = message
    job.state_since = at
    job.version += 1
    if to is JobState.PREPARING and job.started_at is None:
        job.started_at = at
    if to in (JobState.QUEUED, JobState.PAUSED) or to.is_terminal:
        job.start_workers = None
    if to.is_terminal:
        job.ended_at = at
        # What the job left is tidied up at once; should this process die before, the next one finds it due.
        job.next_look_at = at
        job.not_before = None
    details = {"from": str(state), "to": str(to), **({"reason": reason} if reason else {}), **(data or {})}
    record(session, job.id, f"job.{to.lower()}", message, actor, attempt=attempt, data=details, at=at)


def allowed_actions(job: JobRow) -> list[str]:
    """What a user may do with the job now: of cancel, pause, resume, retry."""
    state = JobState(job.state)
    if state in (JobState.FAILED, JobState.CANCELLED):
        return ["retry"] if job.search_id is None else []
    if state.is_terminal:
        return []
    if job.desired == Desired.STOP or state is JobState.STOPPING:
        return []
    if job.search_id is not None:
        # A trial is paused with its search.
        return ["cancel"]
    if job.desired == Desired.PAUSE:
        return ["cancel", "resume"]
    # Evaluation and export keep nothing from which they could continue: while one runs, a pause would waste it.
    can_pause = state is JobState.QUEUED or job.kind in ("pretrain", "finetune", "search")
    return ["cancel", "pause"] if can_pause else ["cancel"]
