"""What drivers tell the control plane: the claim of an attempt, then batches of heartbeats, metrics and events.

Never writes `JobRow.state`, except that a trial runs: the reconciler reads what is noted here and decides. A batch
changes everything it says in one transaction, or, when it was seen before, nothing.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.orm import Session

from configs.ids import parse_attempt_id
from configs.states import AttemptState, Desired, JobState
from configs.wire import ClaimReply, ClaimRequest, Heartbeat, ReportBatch, ReportReply, to_columns
from orchestrator.control.transitions import transition
from orchestrator.services.problems import Fenced, Invalid, NotFound, field_error
from orchestrator.storage.db import Database
from orchestrator.storage.events import lock_job, record
from orchestrator.storage.points import finite, upsert_points
from orchestrator.storage.registry import record_committed
from orchestrator.storage.tables import AttemptRow, JobRow


def claim_attempt(db: Database, attempt_id: str, request: ClaimRequest) -> ClaimReply:
    """Let one driver, known by its nonce, speak for the attempt.

    Raises:
        NotFound: there is no such attempt.
        Fenced: another driver claimed it, it has ended, or a newer attempt took over.
        Invalid: the nonce is not one.
    """
    if not 8 <= len(request.nonce) <= 64:
        raise Invalid("The nonce is not valid.", errors=[field_error("/nonce", "expected 8 to 64 characters")])
    with db.session() as session:
        job, attempt = _locked(session, attempt_id)
        _refuse_superseded(job, attempt)
        if attempt.state == AttemptState.ENDED or JobState(job.state).is_terminal:
            raise Fenced(f"Attempt {attempt_id} has ended ({attempt.exit_reason or job.state}).", state=job.state)
        if attempt.claim_nonce is None:
            attempt.claim_nonce = request.nonce
            attempt.last_report_at = datetime.now(UTC)
            message = f"Driver {request.pid} on {request.node} took over attempt {attempt.number}"
            record(session, job.id, "attempt.claimed", message, attempt_id, attempt.number)
        elif not hmac.compare_digest(attempt.claim_nonce.encode(), request.nonce.encode()):
            raise Fenced(f"Attempt {attempt_id} was claimed by another driver.", state=job.state)
        return ClaimReply(attempt_id=attempt_id, desired=_order(session, job))


def ingest_report(db: Database, attempt_id: str, batch: ReportBatch) -> ReportReply:
    """Store a batch and answer with the order for the attempt.

    Of an attempt that ended but was not succeeded by another one, metrics and events are still taken (a spool that was
    delivered late); its reply is a stop.

    Raises:
        NotFound: there is no such attempt.
        Fenced: a newer attempt took over.
    """
    with db.session() as session:
        job, attempt = _locked(session, attempt_id)
        _refuse_superseded(job, attempt)
        ended = attempt.state == AttemptState.ENDED or JobState(job.state).is_terminal
        if batch.seq > attempt.report_seq:
            attempt.report_seq = batch.seq
            _store_metrics(session, job, attempt, batch)
            _store_events(session, job, attempt, batch)
            attempt.reported = attempt.reported or batch.finished
            if not ended:
                _note_progress(job, attempt, batch, datetime.now(UTC))
                _note_trial_runs(session, job, attempt)
        desired = Desired.STOP if ended else _order(session, job)
        return ReportReply(desired=desired, acknowledged_seq=attempt.report_seq)


def _order(session: Session, job: JobRow) -> Desired:
    """What is desired of the job; of a trial also what is desired of its search."""
    own = Desired(job.desired)
    search = session.get(JobRow, job.search_id) if job.search_id is not None else None
    if search is None or own is Desired.STOP:
        return own
    if JobState(search.state).is_terminal:
        return Desired.STOP
    return Desired(search.desired) if search.desired != Desired.RUN else own


def _note_trial_runs(session: Session, job: JobRow, attempt: AttemptRow) -> None:
    """A trial runs once all its ranks have reported. (Of other jobs the reconciler says so.)"""
    if job.search_id is None or attempt.state != AttemptState.STARTING or len(attempt.ranks) < attempt.world_size:
        return
    attempt.state = AttemptState.RUNNING
    if job.state in (JobState.PREPARING, JobState.RECOVERING):
        message = f"All {attempt.world_size} workers of attempt {attempt.number} have reported"
        transition(session, job, JobState.RUNNING, message=message, actor=attempt.id, attempt=attempt.number)


def _locked(session: Session, attempt_id: str) -> tuple[JobRow, AttemptRow]:
    try:
        job_id, _ = parse_attempt_id(attempt_id)
    except ValueError:
        raise NotFound(f"There is no attempt {attempt_id!r}.") from None
    job = lock_job(session, job_id)
    attempt = session.get(AttemptRow, attempt_id)
    if job is None or attempt is None:
        raise NotFound(f"There is no attempt {attempt_id!r}.")
    return job, attempt


def _refuse_superseded(job: JobRow, attempt: AttemptRow) -> None:
    if attempt.number < job.num_attempts:
        raise Fenced(
            f"Attempt {attempt.id} was succeeded by attempt {job.num_attempts}: it may not report any more.",
            state=job.state,
        )


def _store_metrics(session: Session, job: JobRow, attempt: AttemptRow, batch: ReportBatch) -> None:
    columns = (*batch.columns, *to_columns(batch.metrics))
    upsert_points(session, job.id, attempt.number, batch.seq, columns)
    newest: dict[str, tuple[int, float | None]] = {}
    for column in columns:
        for step, value in zip(column.steps, column.values, strict=True):
            # Of equal steps the last: it is what was stored.
            if column.name not in newest or step >= newest[column.name][0]:
                newest[column.name] = step, value
    if newest:
        job.last_metrics = {**job.last_metrics, **{name: finite(value) for name, (_, value) in newest.items()}}


def _store_events(session: Session, job: JobRow, attempt: AttemptRow, batch: ReportBatch) -> None:
    for event in batch.events:
        # PostgreSQL holds no NUL in text, and a batch it refuses would come again for ever.
        message = event.message.replace("\0", "")
        data = {key: _storable(value) for key, value in event.data.items()}
        record(session, job.id, event.type, message, attempt.id, attempt.number, data, event.at)
    for checkpoint in batch.checkpoints:
        record_committed(session, job.id, attempt.number, checkpoint, attempt.id)


def _storable(value: Any) -> Any:
    """`value` as every database's JSON holds it: null for numbers that are not finite."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return {key: _storable(item) for key, item in value.items()}
    return [_storable(item) for item in value] if isinstance(value, list) else value


def _note_progress(job: JobRow, attempt: AttemptRow, batch: ReportBatch, now: datetime) -> None:
    attempt.last_report_at = now
    if batch.total_steps is not None and job.total_steps is None:
        job.total_steps = batch.total_steps
    # Made anew: the ORM sees a change of a column, not one inside it.
    attempt.ranks = {**attempt.ranks}
    for heartbeat in sorted(batch.heartbeats, key=lambda h: (h.at, h.rank)):
        _note_heartbeat(attempt, heartbeat, now)
    nodes = dict.fromkeys([*attempt.nodes, *(heartbeat.node for heartbeat in batch.heartbeats)])
    attempt.nodes = list(nodes)
    job.step = max(attempt.from_step, attempt.to_step)


def _note_heartbeat(attempt: AttemptRow, heartbeat: Heartbeat, now: datetime) -> None:
    rank = str(heartbeat.rank)
    before: Mapping[str, Any] = attempt.ranks.get(rank, {})
    if (before.get("step"), before.get("phase")) != (heartbeat.step, heartbeat.phase):
        # By our clock: it is compared with last_report_at, and a node's clock may be minutes away.
        attempt.last_progress_at = now
    attempt.ranks[rank] = heartbeat.model_dump(mode="json")
    attempt.to_step = max(attempt.to_step, heartbeat.step)
    if heartbeat.rank == 0:
        attempt.phase = heartbeat.phase
    if attempt.first_step_at is None and heartbeat.step > attempt.from_step:
        # By the node's clock, since a spool is delivered late; but within what is possible.
        attempt.first_step_at = max(attempt.created_at, min(heartbeat.at, now))
