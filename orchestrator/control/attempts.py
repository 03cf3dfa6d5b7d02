"""Beginning and ending attempts.

`start_attempt` is safe to be cut off between any two of its steps, because each can be done again:

1. register every manifest that earlier attempts left;
2. choose the checkpoint to continue from, and see that its files are there; after a loss spike, one from before it;
3. write attempts/NNNN.json, if nobody has (the same content found there is as good as written);
4. in one transaction: the attempt's row, the job's state, what its predecessor wasted;
5. submit it, under its own id: a second submission changes nothing.

Cut off before 4, the next look begins again at 1. Cut off after 4, it finds an attempt that the cluster does not know,
or does, and goes on from there.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from configs.failpoints import failpoint
from configs.ids import attempt_id
from configs.layout import attempt_key, exit_key
from configs.lineage import parents_of_next
from configs.reasons import ExitReason
from configs.states import AttemptState, JobState
from configs.wire import AttemptFile, CheckpointSource, DatasetCard, DataSkip, ExitFile, ParentCut
from orchestrator.control.decide import End
from orchestrator.control.launcher import Launcher
from orchestrator.control.leases import Claim, guarded
from orchestrator.control.queue_view import last_attempt
from orchestrator.control.retries import Next
from orchestrator.control.transitions import transition
from orchestrator.storage.db import Database
from orchestrator.storage.events import RECONCILER, record
from orchestrator.storage.registry import (
    apply_cuts,
    invalidate,
    is_complete,
    newest_checkpoint,
    read_cuts,
    register_manifests,
    resolve_ref,
)
from orchestrator.storage.store import AlreadyExists, NotFound, ObjectStore
from orchestrator.storage.tables import AttemptRow, CheckpointRow, JobRow, MetricRow, SearchRow

TRAIN_LOSS = "train/loss"
STEP_TIME = "perf/step_time_s/"
_NUMBER_TRIES = 100


class CannotStart(Exception):
    """The job can never start: what it begins from does not exist."""


# -- beginning ----------------------------------------------------------------------
def start_attempt(
    db: Database, store: ObjectStore, claim: Claim, world_size: int, cluster_id: str, now: datetime
) -> str:
    """Write down the job's next attempt; returns its id. `submit_attempt` comes next.

    Raises:
        CannotStart: a checkpoint that the job needs is gone; nothing was changed.
        LeaseLost: another process took over; nothing was changed.
        StoreError: the object store failed; begin again later.
    """
    register_manifests(db, store, claim.job_id, guard=lambda session: guarded(session, claim))
    resume = _choose_resume(db, store, claim)
    with db.session() as session:
        job = guarded(session, claim)
        init_from = _resolve_init_from(session, job, needed=resume is None)
        skips = _skips(session, job, resume.step if resume is not None else 0)
        fingerprint = _foreign_fingerprint(session, job, resume)
    parents = read_cuts(store, job.id)
    file = _write_attempt_file(store, job, world_size, resume, init_from, parents, skips, fingerprint, now)
    with db.session() as session:
        job = guarded(session, claim)
        attempt = _insert(session, job, file, resume, cluster_id, now)
        return attempt.id


def submit_attempt(
    db: Database, launcher: Launcher, claim: Claim, attempt: str, cluster_id: str, now: datetime
) -> None:
    """Submit to the cluster `cluster_id`, and note that it was done.

    Raises:
        LauncherError: it may or may not have been accepted; submit again later.
        LeaseLost
    """
    with db.session() as session:
        # Before, not after: a submission to a new cluster whose reply is lost must be looked for there.
        guarded(session, claim)
        session.get_one(AttemptRow, attempt).cluster_id = cluster_id
    failpoint("launch.before_submit")
    launcher.submit(attempt)
    failpoint("launch.after_submit")
    with db.session() as session:
        guarded(session, claim)
        row = session.get_one(AttemptRow, attempt)
        row.submitted_at = now
        message = f"Attempt {row.number} was submitted to the cluster"
        record(session, row.job_id, "attempt.submitted", message, RECONCILER, attempt=row.number, at=now)


def _choose_resume(db: Database, store: ObjectStore, claim: Claim) -> CheckpointRow | None:
    """The newest checkpoint that counts and whose files are all there; else the one a retried job continues from.

    After a loss spike the newest that is known to be sound; where retention has left none of those, the oldest."""
    while True:
        with db.reader() as session:
            job = session.get_one(JobRow, claim.job_id)
            last = last_attempt(session, job)
            sound_step = (last.exit or {}).get("sound_step") if last is not None else None
            row = newest_checkpoint(session, job.id, up_to_step=sound_step)
            other = session.get(CheckpointRow, job.resume_from) if job.resume_from else None
        if row is None:
            break
        if is_complete(store, row.prefix):
            return row
        with db.session() as session:
            guarded(session, claim)
            invalidate(session, job.id, row.id, "some of its files are missing or have another size")
    if job.resume_from is None:
        return None
    if other is None or not other.valid or other.deleted_at is not None or not is_complete(store, other.prefix):
        raise CannotStart(f"The checkpoint {job.resume_from} that this job continues from does not exist any more.")
    return other


def _skips(session: Session, job: JobRow, step: int) -> tuple[DataSkip, ...]:
    """The data that this job's rollbacks pass over, with the one that goes back to `step` now: each attempt that
    ended in a spike, up to where it ended, counted from where its successor continued."""
    by_number = select(AttemptRow).where(AttemptRow.job_id == job.id).order_by(AttemptRow.number)
    attempts = list(session.scalars(by_number))
    from_steps = [*(attempt.from_step for attempt in attempts[1:]), step]
    return tuple(
        DataSkip(attempt_id=spiked.id, at_step=from_step, num_batches=spiked.exit["last_step"] - from_step)
        for spiked, from_step in zip(attempts, from_steps, strict=False)
        if spiked.exit_reason == ExitReason.LOSS_SPIKE and spiked.exit is not None
    )


def _foreign_fingerprint(session: Session, job: JobRow, resume: CheckpointRow | None) -> str | None:
    """The training fingerprint of the other trial that this one goes on from, with settings of its own."""
    if resume is None or resume.job_id == job.id or job.search_id is None:
        return None
    return session.get_one(JobRow, resume.job_id).training_fingerprint


def _resolve_init_from(session: Session, job: JobRow, *, needed: bool) -> CheckpointRow | None:
    """The checkpoint whose weights the job starts from; a reference by job is resolved once, and kept. One that is gone
    matters only if it is `needed`: who resumes reads all weights from there."""
    if job.init_from is None:
        return None
    row = resolve_ref(session, job.init_from, hold=True)
    if row is None:
        if not needed:
            return None
        raise CannotStart(f"init_from: there is no checkpoint {job.init_from}.")
    job.init_from = row.id
    return row


def _write_attempt_file(
    store: ObjectStore,
    job: JobRow,
    world_size: int,
    resume: CheckpointRow | None,
    init_from: CheckpointRow | None,
    parents: tuple[ParentCut, ...],
    skips: tuple[DataSkip, ...],
    resume_fingerprint: str | None,
    now: datetime,
) -> AttemptFile:
    """Write the next attempt's file. Where one lies already that an interrupted start left, it is taken if it says the
    same; else the next number is used, and that one stays without an attempt."""
    own = (resume.attempt, resume.step) if resume is not None and resume.job_id == job.id else None
    for number in range(job.num_attempts + 1, job.num_attempts + 1 + _NUMBER_TRIES):
        file = AttemptFile(
            job_id=job.id,
            attempt_id=attempt_id(job.id, number),
            number=number,
            spec=json.loads(job.spec_json),
            spec_hash=job.spec_hash,
            training_fingerprint=job.training_fingerprint,
            world_size=world_size,
            dataset=DatasetCard.model_validate(job.dataset) if job.dataset else None,
            parents=parents_of_next(number, parents, own),
            resume_from=_source(resume),
            init_from=_source(init_from),
            skips=skips,
            resume_fingerprint=resume_fingerprint,
            created_at=now,
        )
        key = attempt_key(file.attempt_id)
        try:
            store.put(key, file.model_dump_json(indent=1).encode(), if_none_match=True)
            return file
        except AlreadyExists:
            found = AttemptFile.model_validate_json(store.get(key))
            if found.model_copy(update={"created_at": now}) == file:
                return found
    raise RuntimeError(f"{job.id}: {_NUMBER_TRIES} attempt files without an attempt")


def _insert(
    session: Session, job: JobRow, file: AttemptFile, resume: CheckpointRow | None, cluster_id: str, now: datetime
) -> AttemptRow:
    step = resume.step if resume is not None else 0
    before = last_attempt(session, job)
    if before is not None:
        account_waste(session, job, before, step)
    apply_cuts(session, job.id, file.parents)
    attempt = AttemptRow(
        id=file.attempt_id,
        job_id=job.id,
        number=file.number,
        state=AttemptState.STARTING,
        world_size=file.world_size,
        cluster_id=cluster_id,
        from_checkpoint=resume.id if resume is not None else None,
        from_step=step,
        to_step=step,
        created_at=now,
    )
    session.add(attempt)
    job.num_attempts = file.number
    job.step = step
    job.start_workers = None
    job.not_before = None
    origin = f"from step {step}" if resume is not None else "from the start"
    message = f"Attempt {file.number} begins with {file.world_size} workers, {origin}"
    data = {"world_size": file.world_size, "from_step": step, "from_checkpoint": attempt.from_checkpoint}
    if job.state == JobState.QUEUED:
        transition(session, job, JobState.PREPARING, message=message, actor=RECONCILER, attempt=file.number, at=now)
    record(session, job.id, "attempt.created", message, RECONCILER, attempt=file.number, data=data, at=now)
    return attempt


def _source(row: CheckpointRow | None) -> CheckpointSource | None:
    return None if row is None else CheckpointSource(checkpoint_id=row.id, prefix=row.prefix)


# -- ending ----------------------------------------------------------------------
def read_exit(store: ObjectStore, attempt: str) -> ExitFile | None:
    """What the attempt's driver wrote at its end; None if it has written nothing that can be read."""
    try:
        said = ExitFile.model_validate_json(store.get(exit_key(attempt)))
    except (NotFound, ValueError):
        return None
    return said if said.attempt_id == attempt else None


def end_attempt(session: Session, job: JobRow, attempt: AttemptRow, end: End, now: datetime) -> None:
    """Close an attempt that is proved gone, account for it, and move the job, in this transaction."""
    said = end.exit
    ended_at = max(attempt.created_at, min(now, said.ended_at)) if said is not None else now
    attempt.to_step = max(attempt.to_step, said.last_step if said is not None else 0)
    attempt.state = AttemptState.ENDED
    attempt.exit_reason = end.reason
    attempt.exit = _conclusion(attempt, end, ended_at).model_dump(mode="json")
    attempt.ended_at = ended_at
    job.step = max(job.step, attempt.to_step)
    if job.kind == "search":
        # The next attempt begins with what it is given, until then no more is held than this one began with.
        session.get_one(SearchRow, job.id).places = None
    else:  # How many workers a search has changes while it runs: what its trials use counts (`release_trials`).
        job.gpu_seconds += (ended_at - attempt.created_at).total_seconds() * attempt.world_size
    if attempt.number > 1:
        job.overhead_s += ((attempt.first_step_at or ended_at) - attempt.created_at).total_seconds()
    message = f"Attempt {attempt.number} ended: {end.reason}" + (f": {end.message}" if end.message else "")
    data = {"reason": end.reason, "to_step": attempt.to_step}
    record(session, job.id, "attempt.ended", message, RECONCILER, attempt=attempt.number, data=data, at=now)
    if end.reason is ExitReason.CHECKPOINT_CORRUPT and attempt.from_checkpoint is not None:
        why = f"attempt {attempt.number} could not load it"
        invalidate(session, job.id, attempt.from_checkpoint, why, attempt.number)
    if end.next.state in (JobState.FAILED, JobState.CANCELLED):
        account_waste(session, job, attempt, _kept_step(session, job))
    move_job(session, job, end.next, now, attempt.number)


def settle_job(session: Session, job: JobRow, following: Next, now: datetime) -> None:
    """Move a job of which nothing runs, in this transaction. Where it ends so, nobody does again what its last attempt
    did beyond the newest checkpoint."""
    last = last_attempt(session, job)
    if last is not None and following.state in (JobState.FAILED, JobState.CANCELLED):
        account_waste(session, job, last, _kept_step(session, job))
    move_job(session, job, following, now)


def move_job(session: Session, job: JobRow, following: Next, now: datetime, attempt: int | None = None) -> None:
    """Bring the job where `following` says, with its counters and its back-off, in this transaction."""
    job.user_failures = following.user_failures
    job.infra_failures = following.infra_failures
    if following.desired is not None:
        job.desired = following.desired
    if following.state == job.state == JobState.RECOVERING:
        # Lost again before it ran: the same state, a new reason and a new back-off.
        job.reason, job.message, job.state_since = following.reason, following.message, now
        job.version += 1
        data = {"reason": following.reason}
        record(session, job.id, "job.recovering", following.message, RECONCILER, attempt=attempt, data=data, at=now)
    else:
        transition(
            session,
            job,
            following.state,
            reason=following.reason,
            message=following.message,
            actor=RECONCILER,
            attempt=attempt,
            at=now,
        )
    job.not_before = now + timedelta(seconds=following.delay_s) if following.delay_s > 0 else None


def account_waste(session: Session, job: JobRow, attempt: AttemptRow, kept_step: int) -> None:
    """Add to the job what `attempt` did beyond `kept_step`, the step that its successor continues from (or, when none
    follows, that of the newest checkpoint). Called once for each attempt.

    wasted_steps = to_step - kept_step: the steps that are done again. to_step is the last one that anybody reported, by
    heartbeat, in the exit file or by a metric.
    wasted_gpu_s = wasted_steps x seconds per step x world_size. Seconds per step are the mean of the attempt's
    `perf/step_time_s` points beyond `kept_step`; where it reported none, the time from its first reported step to its
    last progress, divided by the steps in between.
    """
    if job.kind == "search":
        # Its steps are trials that ended; what those wasted is counted with them.
        return
    attempt.to_step = max(attempt.to_step, _last_step_measured(session, attempt))
    lost = max(0, attempt.to_step - kept_step)
    attempt.wasted_steps = lost
    job.wasted_steps += lost
    if lost:
        job.wasted_gpu_s += lost * _seconds_per_step(session, attempt, kept_step) * attempt.world_size


def _kept_step(session: Session, job: JobRow) -> int:
    """The step that the job has reached for good: that of its newest checkpoint, or of the other job's it began at."""
    kept = newest_checkpoint(session, job.id)
    if kept is None and job.resume_from is not None:
        kept = session.get(CheckpointRow, job.resume_from)
    return kept.step if kept is not None else 0


def _last_step_measured(session: Session, attempt: AttemptRow) -> int:
    """A point of training is recorded after its step; it may have arrived when the last heartbeat did not."""
    points = select(func.max(MetricRow.step)).where(
        MetricRow.job_id == attempt.job_id,
        MetricRow.attempt == attempt.number,
        MetricRow.name == TRAIN_LOSS,
    )
    return session.scalar(points) or 0


def _seconds_per_step(session: Session, attempt: AttemptRow, after_step: int) -> float:
    points = select(func.avg(MetricRow.value)).where(
        MetricRow.job_id == attempt.job_id,
        MetricRow.attempt == attempt.number,
        MetricRow.name.startswith(STEP_TIME, autoescape=True),
        MetricRow.step > after_step,
    )
    measured = session.scalar(points)
    if measured is not None:
        return float(measured)
    if attempt.first_step_at is None or attempt.last_progress_at is None:
        return 0.0
    # The step that set first_step_at was done before this clock started.
    steps = attempt.to_step - attempt.from_step - 1
    return max(0.0, (attempt.last_progress_at - attempt.first_step_at).total_seconds()) / max(1, steps)


def _conclusion(attempt: AttemptRow, end: End, ended_at: datetime) -> ExitFile:
    """The exit file with our verdict in it; one of our own where the driver left none."""
    if end.exit is not None:
        return end.exit.model_copy(update={"reason": end.reason, "message": end.message})
    return ExitFile(
        attempt_id=attempt.id,
        reason=end.reason,
        message=end.message,
        last_step=attempt.to_step,
        ended_at=ended_at,
    )
