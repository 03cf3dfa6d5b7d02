"""What the driver of a search asks of the control plane: its trials as they are, a new one, the beginning and the end
of a trial's attempts.

A trial is a job that the queue leaves alone. Its state moves by the same rules as any job's (decide.conclude,
retries.follow, attempts.end_attempt), only that the search's driver brings the news instead of the reconciler. Every
call may be repeated: what was done before is not done again.
"""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from configs.ids import new_job_id, parse_attempt_id
from configs.load import SpecError
from configs.reasons import ExitReason
from configs.resolve import load_resolved, spec_hash
from configs.search_trials import trial_spec, workers_per_trial
from configs.search_wire import SearchLimits, SearchState, TrialBegun, TrialCreate, TrialEnd, TrialEnded, TrialRecord
from configs.spec import SearchJob
from configs.states import AttemptState, JobState
from orchestrator.control.attempts import CannotStart, end_attempt, start_attempt
from orchestrator.control.decide import Observation, conclude
from orchestrator.control.leases import Claim, claim_job, guarded, release
from orchestrator.control.measured import recover_measured
from orchestrator.control.observe import load_facts, made_progress
from orchestrator.control.queue_view import last_attempt, num_trials_under_way
from orchestrator.control.transitions import enqueue, transition
from orchestrator.services.metrics import Point, in_lineage, last_valid_steps_of, latest_attempts
from orchestrator.services.problems import Conflict, Fenced, NotFound, Unavailable
from orchestrator.services.submission import Request, job_row, prepare
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.events import lock_job, record
from orchestrator.storage.registry import newest_checkpoint, read_attempt_file, register_manifests
from orchestrator.storage.store import ObjectStore
from orchestrator.storage.tables import AttemptRow, CheckpointRow, JobRow, MetricRow, SearchRow, TrialRow

_LEASE_S = 30.0


# -- reading -----------------------------------------------------------------------------------------------------------
def search_state(db: Database, attempt_id: str) -> SearchState:
    """Everything of the search whose driver asks. Raises NotFound, Fenced."""
    with db.reader() as session:
        search, _ = _speaking(session, attempt_id)
        limits = session.get_one(SearchRow, search.id)
        ended = session.scalars(
            select(AttemptRow).where(AttemptRow.job_id == search.id, AttemptRow.ended_at.is_not(None))
        )
        ran_s = sum((a.ended_at - a.created_at).total_seconds() for a in ended if a.ended_at is not None)
        return SearchState(
            job_id=search.id,
            num_trials=limits.num_trials,
            slots=limits.slots,
            places=limits.places,
            ran_s=ran_s,
            trials=trial_records(session, search),
        )


def search_limits(db: Database, attempt_id: str) -> SearchLimits:
    """What may have changed since the driver began. Raises NotFound, Fenced."""
    with db.reader() as session:
        search, _ = _speaking(session, attempt_id)
        row = session.get_one(SearchRow, search.id)
        return SearchLimits(num_trials=row.num_trials, slots=row.slots, places=row.places)


def trial_records(session: Session, search: JobRow) -> tuple[TrialRecord, ...]:
    """The search's trials by number, each with its curve."""
    rows = session.scalars(select(TrialRow).where(TrialRow.search_id == search.id).order_by(TrialRow.number))
    metric = search_spec(search).metric
    return tuple(trial_record(session, row, session.get_one(JobRow, row.job_id), metric) for row in rows)


def trial_record(session: Session, trial: TrialRow, job: JobRow, metric: str) -> TrialRecord:
    """A trial's row and its job's as one record."""
    points = _points(session, job.id, metric)
    return TrialRecord(
        number=trial.number,
        job_id=job.id,
        state=JobState(job.state),
        reason=job.reason,
        message=job.message,
        role="final" if trial.role == "final" else "trial",
        setting=trial.setting,
        repeat=trial.repeat,
        params=trial.params,
        parent=trial.parent,
        parent_step=trial.parent_step,
        replaces=trial.replaces,
        asked_after=trial.asked_after,
        told=trial.told,
        curve=tuple((point.step, point.value) for point in points if point.value is not None),
        has_metric=bool(points),
        step=job.step,
        total_steps=job.total_steps,
        gpu_seconds=job.gpu_seconds,
    )


def search_spec(search: JobRow) -> SearchJob:
    spec = load_resolved(search.spec_json)
    assert isinstance(spec, SearchJob), f"{search.id} is of kind {search.kind}"
    return spec


def _points(session: Session, job_id: str, metric: str) -> list[Point]:
    where = (MetricRow.job_id == job_id, MetricRow.name == metric, in_lineage(last_valid_steps_of(session, job_id)))
    query = select(MetricRow.step, MetricRow.attempt, MetricRow.value).where(*where)
    rows = session.execute(query.order_by(MetricRow.step, MetricRow.attempt))
    return list(latest_attempts(Point(step, attempt, value) for step, attempt, value in rows))


def _speaking(session: Session, attempt_id: str, *, lock: bool = False) -> tuple[JobRow, AttemptRow]:
    """The search and its attempt, if that one may still act for it.

    Raises:
        NotFound: there is no such attempt of a search.
        Fenced: it has ended, or a newer one took over.
    """
    try:
        job_id, _ = parse_attempt_id(attempt_id)
    except ValueError:
        raise NotFound(f"There is no attempt {attempt_id!r}.") from None
    search = lock_job(session, job_id) if lock else session.get(JobRow, job_id)
    attempt = session.get(AttemptRow, attempt_id)
    if search is None or attempt is None or search.kind != "search":
        raise NotFound(f"There is no attempt {attempt_id!r} of a search.")
    if attempt.number < search.num_attempts or attempt.state == AttemptState.ENDED:
        raise Fenced(f"Attempt {attempt_id} may not act for its search any more.", state=search.state)
    if JobState(search.state).is_terminal:
        raise Fenced(f"Search {search.id} has ended ({search.state}).", state=search.state)
    return search, attempt


def _trial(session: Session, search: JobRow, number: int) -> tuple[TrialRow, JobRow]:
    row = session.get(TrialRow, (search.id, number))
    if row is None:
        raise NotFound(f"Search {search.id} has no trial {number}.")
    job = lock_job(session, row.job_id)
    assert job is not None, "jobs are never deleted"
    return row, job


# -- a new one ---------------------------------------------------------------------------------------------------------
def create_trial(db: Database, store: ObjectStore, attempt_id: str, request: TrialCreate) -> TrialRecord:
    """Add a trial to the search. One whose description is not valid is there too, as a failed one.

    Raises:
        NotFound, Fenced
        Conflict: the number is taken by another trial, or the parent has no checkpoint to go on from.
        StoreError
    """
    if request.parent is not None:
        with db.reader() as session:
            search, _ = _speaking(session, attempt_id)
            parent = session.get(TrialRow, (search.id, request.parent))
        if parent is not None:
            register_manifests(db, store, parent.job_id)
    with db.session() as session:
        search, _ = _speaking(session, attempt_id, lock=True)
        spec = search_spec(search)
        there = session.get(TrialRow, (search.id, request.number))
        if there is not None:
            if (there.params, there.setting, there.repeat) != (request.params, request.setting, request.repeat):
                raise Conflict(f"Trial {request.number} of {search.id} is another one.")
            return trial_record(session, there, session.get_one(JobRow, there.job_id), spec.metric)
        job = _new_job(session, search, spec, request, attempt_id)
        fields: dict[str, Any] = request.model_dump(include={column.name for column in TrialRow.__table__.columns})
        row = TrialRow(search_id=search.id, job_id=job.id, **fields)
        session.add(row)
        _mark_ended(session, search, row, job)
        session.flush()
        message = f"Trial {row.number} was made: {json.dumps(row.params, sort_keys=True)[:300]}"
        record(session, search.id, "trial.created", message, attempt_id, data={"trial": row.number, "job_id": job.id})
        return trial_record(session, row, job, spec.metric)


def _new_job(session: Session, search: JobRow, spec: SearchJob, request: TrialCreate, actor: str) -> JobRow:
    parent = None if request.parent is None else _parent_checkpoint(session, search, request)
    raw: dict[str, Any] = {}
    try:
        raw = trial_spec(
            spec, request.params, request.repeat, final=request.role == "final", init_from=search.init_from
        )
        raw["name"] = f"{search.name[:110]} {'final' if request.role == 'final' else f'#{request.number}'}"
        asked = Request(raw, {})
        job, fault = job_row(asked, prepare(session, asked, hold=True)), None
    except SpecError as error:
        job, fault = _invalid_job(search, raw, request), str(error)
    job.search_id = search.id
    job.created_by = search.created_by
    if parent is not None:
        job.resume_from, job.step = parent.id, parent.step
    enqueue(session, job, actor=actor, at=datetime.now(UTC))
    if fault is not None:
        transition(session, job, JobState.FAILED, reason=ExitReason.SPEC_INVALID, message=fault[:2000], actor=actor)
    return job


def _parent_checkpoint(session: Session, search: JobRow, request: TrialCreate) -> CheckpointRow:
    """The checkpoint that a replacing trial goes on from, held so that retention leaves it."""
    row = session.get(TrialRow, (search.id, request.parent))
    found = None if row is None else newest_checkpoint(session, row.job_id, up_to_step=request.parent_step)
    if found is None or (request.parent_step is not None and found.step > request.parent_step):
        raise Conflict(f"Trial {request.parent} has no checkpoint up to step {request.parent_step}.")
    held = select(CheckpointRow).where(CheckpointRow.id == found.id).with_for_update()
    return session.scalars(held.execution_options(populate_existing=True)).one()


def _invalid_job(search: JobRow, raw: dict[str, Any], request: TrialCreate) -> JobRow:
    """A job that says what was asked for and never runs."""
    document = raw or {"kind": "pretrain", **request.params}
    stored = json.dumps(document, sort_keys=True).encode()
    return JobRow(
        id=new_job_id(),
        kind=str(document.get("kind") or "pretrain"),
        name=f"{search.name[:110]} #{request.number}",
        project=search.project,
        labels={},
        submitted={"spec": document, "overrides": {}},
        spec_json=stored,
        spec_hash=spec_hash(stored),
        training_fingerprint="",
        plan={},
        priority=search.priority,
    )


# -- its attempts ------------------------------------------------------------------------------------------------------
def begin_trial(db: Database, store: ObjectStore, attempt_id: str, number: int) -> TrialBegun:
    """Write down the trial's next attempt, or find the one whose beginning was not heard of. A trial that has ended
    (a user stopped it while it waited) has no attempt.

    Raises:
        NotFound, Fenced
        Unavailable: somebody else is looking at the trial; ask again.
        StoreError
    """
    with db.session() as session:
        search, attempt = _speaking(session, attempt_id, lock=True)
        spec = search_spec(search)
        row, job = _trial(session, search, number)
        last = last_attempt(session, job)
        if last is not None and last.state != AttemptState.ENDED and not JobState(job.state).is_terminal:
            return TrialBegun(
                trial=trial_record(session, row, job, spec.metric), attempt=read_attempt_file(store, last.id)
            )
        _mark_ended(session, search, row, job)
        is_over, job_id = JobState(job.state).is_terminal, job.id
        if not is_over:
            _check_room(session, search, attempt, workers_per_trial(spec))
        cluster_id, created_at = attempt.cluster_id, datetime.now(UTC)
        last_id = None if last is None else last.id
    if not is_over:
        if last_id is not None:
            # Its driver was killed: what it measured up to its last checkpoint is never done again.
            register_manifests(db, store, job_id)
            recover_measured(db, store, last_id, guard=lambda session: _speaking(session, attempt_id, lock=True))
        _start(db, store, job_id, attempt_id, workers_per_trial(spec), cluster_id, created_at)
    with db.session() as session:
        search, _ = _speaking(session, attempt_id, lock=True)
        row, job = _trial(session, search, number)
        _mark_ended(session, search, row, job)
        last = last_attempt(session, job)
        is_live = last is not None and last.state != AttemptState.ENDED
        if last is not None and is_live:
            last.submitted_at = created_at
        file = read_attempt_file(store, last.id) if last is not None and is_live else None
        return TrialBegun(trial=trial_record(session, row, job, spec.metric), attempt=file)


def _check_room(session: Session, search: JobRow, attempt: AttemptRow, per_trial: int) -> None:
    """The scheduler counts on it that no more trials begin than it allows now; a driver hears of that a little later.

    Raises:
        Unavailable: as many as may run side by side do.
    """
    row = session.get_one(SearchRow, search.id)
    limits = SearchLimits(num_trials=row.num_trials, slots=row.slots, places=row.places)
    allowed = limits.side_by_side(attempt.world_size // per_trial)
    if num_trials_under_way(session, [search.id]).get(search.id, 0) >= allowed:
        raise Unavailable(f"{allowed} trials of {search.id} are under way, as many as may be now; ask again.")


def _start(
    db: Database, store: ObjectStore, job_id: str, actor: str, world_size: int, cluster_id: str, now: datetime
) -> None:
    claim = claim_job(db, job_id, actor, now, _LEASE_S)
    if claim is None:
        raise Unavailable(f"Trial {job_id} is being looked at; ask again.")
    try:
        start_attempt(db, store, claim, world_size, cluster_id, now)
    except CannotStart as error:
        with db.session() as session:
            job = guarded(session, claim)
            reason, message = ExitReason.SPEC_INVALID, str(error)
            transition(session, job, JobState.FAILED, reason=reason, message=message, actor=actor)
    finally:
        _give_back(db, claim)


def _give_back(db: Database, claim: Claim) -> None:
    with db.reader() as session:
        # One that has ended is due for tidying up; nothing else of a trial is.
        next_look_at = session.get_one(JobRow, claim.job_id).next_look_at
    release(db, claim, next_look_at)


def end_trial(
    db: Database, store: ObjectStore, settings: Settings, attempt_id: str, number: int, end: TrialEnd
) -> TrialEnded:
    """Close an attempt of the trial, whose processes are gone, and move the trial on.

    Raises:
        NotFound, Fenced
        StoreError
    """
    with db.session() as session:
        search, _ = _speaking(session, attempt_id, lock=True)
        _, job = _trial(session, search, number)
        job_id = job.id
        ending_attempt = session.get(AttemptRow, end.exit.attempt_id)
        if ending_attempt is None or ending_attempt.job_id != job_id:
            raise NotFound(f"Trial {number} has no attempt {end.exit.attempt_id!r}.")
    register_manifests(db, store, job_id)
    recover_measured(db, store, end.exit.attempt_id, guard=lambda session: _speaking(session, attempt_id, lock=True))
    facts = load_facts(db, job_id)
    with db.session() as session:
        search, own_attempt = _speaking(session, attempt_id, lock=True)
        row, job = _trial(session, search, number)
        attempt = session.get_one(AttemptRow, end.exit.attempt_id)
        now = datetime.now(UTC)
        if attempt.state != AttemptState.ENDED and not JobState(job.state).is_terminal:
            newest = newest_checkpoint(session, job_id)
            seen = Observation(
                watching_since=now,
                exit=end.exit,
                newest_step=newest.step if newest is not None else None,
                made_progress=made_progress(session, attempt),
                previous=facts.previous,
                num_rollbacks=facts.num_rollbacks,
            )
            ending = conclude(job, attempt, end.exit.reason, end.exit.message, seen, facts.policy, settings, _jitter())
            end_attempt(session, job, attempt, ending, now)
        if _mark_ended(session, search, row, job):
            own_attempt.ended_trials += 1
            _record_end(session, search, row, job, attempt_id)
        delay_s = (job.not_before - now).total_seconds() if job.not_before is not None else 0.0
        trial = trial_record(session, row, job, search_spec(search).metric)
        return TrialEnded(trial=trial, delay_s=max(0.0, delay_s))


def _jitter() -> float:
    return random.random()


def _mark_ended(session: Session, search: JobRow, row: TrialRow, job: JobRow) -> bool:
    """Give a trial that has ended its place among all ends. Returns whether it had none."""
    if row.told is not None or not JobState(job.state).is_terminal:
        return False
    highest = session.scalar(select(func.max(TrialRow.told)).where(TrialRow.search_id == search.id))
    row.told = (highest or 0) + 1
    return True


def _record_end(session: Session, search: JobRow, row: TrialRow, job: JobRow, actor: str) -> None:
    value = job.last_metrics.get(search_spec(search).metric)
    message = f"Trial {row.number} ended: {job.state}, {job.reason}"
    data = {"trial": row.number, "job_id": job.id, "state": job.state, "reason": job.reason, "value": value}
    record(session, search.id, "trial.ended", message, actor, data=data)
