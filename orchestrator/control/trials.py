"""What becomes of a search's trials when its own attempt is gone, or the search itself."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from configs.reasons import ExitReason
from configs.states import AttemptState, JobState
from orchestrator.control.attempts import end_attempt, move_job
from orchestrator.control.decide import End
from orchestrator.control.queue_view import last_attempt
from orchestrator.control.retries import Next, move
from orchestrator.storage.events import lock_job
from orchestrator.storage.tables import JobRow, SearchRow, TrialRow


def release_trials(session: Session, search: JobRow, now: datetime) -> int:
    """Close the attempts of trials that the search's attempt took with it, in this transaction: they go on with the
    search, or, where that has ended, end too. What they have used is what the search has. Returns how many trials were
    touched."""
    is_over, touched = JobState(search.state).is_terminal, 0
    live = [state for state in JobState if not state.is_terminal]
    mine = select(JobRow.id).where(JobRow.search_id == search.id, JobRow.state.in_(live)).order_by(JobRow.id)
    for job_id in session.scalars(mine).all():
        job = lock_job(session, job_id)
        if job is None or JobState(job.state).is_terminal:
            continue
        following = (
            _ended_with(job, search) if is_over else move(job, JobState.QUEUED, None, "Goes on with its search.")
        )
        attempt = last_attempt(session, job)
        if attempt is not None and attempt.state != AttemptState.ENDED:
            reason = ExitReason.SEARCH_ENDED if is_over else ExitReason.DRIVER_LOST
            end_attempt(session, job, attempt, End(reason, "Its search's attempt ended.", None, following), now)
        elif is_over:
            move_job(session, job, following, now)
        else:
            continue
        touched += 1
    session.flush()
    used = select(func.sum(JobRow.gpu_seconds)).where(JobRow.search_id == search.id)
    search.gpu_seconds = session.scalar(used) or 0.0
    return touched


def _ended_with(job: JobRow, search: JobRow) -> Next:
    message = f"Its search {search.id} ended ({search.state}) before it did."
    return move(job, JobState.CANCELLED, ExitReason.SEARCH_ENDED, message)


def copy_trials(session: Session, old: JobRow, new_id: str, num_trials: int) -> None:
    """Give a search that goes on from another one that one's limits and ended trials. Those that had not ended are not
    taken: they were cancelled with it, and their settings are tried again."""
    limits = session.get_one(SearchRow, old.id)
    session.add(SearchRow(job_id=new_id, num_trials=num_trials, slots=limits.slots))
    rows: Iterable[TrialRow] = session.scalars(select(TrialRow).where(TrialRow.search_id == old.id))
    for row in rows:
        if session.get_one(JobRow, row.job_id).reason == ExitReason.SEARCH_ENDED:
            continue
        values = {column.name: getattr(row, column.name) for column in TrialRow.__table__.columns}
        session.add(TrialRow(**(values | {"search_id": new_id})))
