"""The reconciler: takes one job by lease, looks at it, decides, and does what was decided.

    claim_due        one job whose next look has come
    load             its row, its last two attempts: a short session
    observe          exit file, cluster, manifests: no session open
    decide           pure (`decide.decide`)
    apply            short sessions guarded by the lease's token, network calls in between them
    release          with the time of the next look

Every step can be cut off and done again. Only this moves `JobRow.state`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from configs.reasons import ExitReason, QueueReason
from configs.states import AttemptState, Desired, JobState
from orchestrator.control.attempts import CannotStart, end_attempt, settle_job, start_attempt, submit_attempt
from orchestrator.control.decide import (
    REAP_LOOK_S,
    SOON_S,
    AskToLeave,
    Condition,
    Decision,
    End,
    Kill,
    Launch,
    MarkRunning,
    Observation,
    Reap,
    Settle,
    Submit,
    Wait,
    Withdraw,
    decide,
)
from orchestrator.control.launcher import Launcher, LauncherError
from orchestrator.control.leases import Claim, LeaseLost, claim_due, guarded, release, renew
from orchestrator.control.measured import recover_measured
from orchestrator.control.observe import Facts, Observer, load_facts
from orchestrator.control.retries import Next, move
from orchestrator.control.transitions import transition
from orchestrator.control.trials import release_trials
from orchestrator.settings import Settings
from orchestrator.storage.db import Database, is_unavailable
from orchestrator.storage.events import RECONCILER, record
from orchestrator.storage.registry import apply_retention, sweep
from orchestrator.storage.store import ObjectStore, StoreError
from orchestrator.storage.tables import AttemptRow, JobRow

log = structlog.get_logger(__name__)
AFTER_ERROR_S = 5.0
TIDY_AGAIN_S = 60.0
MAX_LOOK_S = 5.0
"""A user's order that arrives during a look is seen after so long at the latest: giving the job back overwrites its
wake-up call."""
_CONDITIONS = (QueueReason.CLUSTER_UNREACHABLE, QueueReason.WAITING_FOR_WORKERS)


def utc_now() -> datetime:
    return datetime.now(UTC)


class Reconciler:
    """Brings jobs to where they are wanted. Several threads, and several processes, may call `run_once`."""

    def __init__(
        self,
        db: Database,
        launcher: Launcher,
        store: ObjectStore,
        settings: Settings,
        clock: Callable[[], datetime] = utc_now,
        owner: str = "reconciler",
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._db, self._launcher, self._store, self._settings = db, launcher, store, settings
        self._clock, self._owner, self._jitter = clock, owner, jitter
        self._observer = Observer(db, launcher, store, settings, clock)

    def run_once(self) -> int:
        """Look at one job that is due. Returns how many were looked at: 0 or 1."""
        claim = self.claim()
        if claim is None:
            return 0
        self.look_at(claim)
        return 1

    def claim(self) -> Claim | None:
        """The job that has waited longest for a look; None if none is due. `look_at` comes next."""
        return claim_due(self._db, self._owner, self._clock(), self._settings.lease_s)

    def look_at(self, claim: Claim) -> None:
        """Observe the claimed job, decide, act, and give it back."""
        try:
            next_look_at = self._handle(claim)
        except LeaseLost as error:
            log.warning("Lease lost; nothing was written.", job=claim.job_id, detail=str(error))
            return
        except (StoreError, LauncherError) as error:
            next_look_at = self._put_off(claim, error)
        except Exception as error:  # one job's trouble is not the others': this loop must live
            if is_unavailable(error):
                log.warning("The database is busy or away.", job=claim.job_id, detail=str(error))
            else:
                log.exception("A look at a job failed.", job=claim.job_id)
            next_look_at = self._later(AFTER_ERROR_S)
        try:
            release(self._db, claim, next_look_at)
        except LeaseLost:
            log.warning("The lease had run out before it was given back.", job=claim.job_id)

    def _handle(self, claim: Claim) -> datetime | None:
        facts = load_facts(self._db, claim.job_id)
        if JobState(facts.job.state).is_terminal:
            return self._tidy(claim)
        seen = self._observer.look(claim, facts)
        now = self._clock()
        decision = decide(facts.job, facts.attempt, seen, now, self._settings, facts.policy, self._jitter())
        if not isinstance(decision, Wait):
            attempt = facts.attempt.id if facts.attempt is not None else None
            summary = repr(decision)[:300]
            log.info("Decided.", job=claim.job_id, attempt=attempt, state=facts.job.state, decision=summary)
        return self._apply(claim, facts, seen, decision)

    # -- apply ----------------------------------------------------------------------
    def _apply(self, claim: Claim, facts: Facts, seen: Observation, decision: Decision) -> datetime | None:
        """Do what was decided. Returns when to look again; None: when something about the job changes."""
        match decision:
            case Wait(seconds, condition):
                self._note(claim, facts.job, condition)
                return self._later(seconds)
            case Launch(world_size):
                return self._launch(claim, facts, seen, world_size)
            case Submit():
                assert facts.attempt is not None
                assert seen.cluster_id is not None
                submit_attempt(self._db, self._launcher, claim, facts.attempt.id, seen.cluster_id, self._clock())
                return self._later(SOON_S)
            case MarkRunning():
                self._mark_running(claim)
                return self._later(self._settings.poll_s)
            case AskToLeave():
                self._ask_to_leave(claim, decision)
                return self._later(SOON_S)
            case Withdraw():
                self._withdraw(claim)
                return self._later(SOON_S)
            case Kill():
                return self._kill(claim, decision)
            case Reap(leftovers):
                return self._reap(claim, facts, leftovers)
            case End():
                return self._end(claim, facts, decision)
            case Settle(following):
                return self._settle(claim, facts, following)

    def _launch(self, claim: Claim, facts: Facts, seen: Observation, world_size: int) -> datetime | None:
        if seen.cluster_id is None:
            condition = Condition(QueueReason.CLUSTER_UNREACHABLE, "Cannot start yet: the Ray cluster does not answer.")
            self._note(claim, facts.job, condition)
            return self._later(self._settings.poll_s)
        claim = renew(self._db, claim, self._clock(), self._settings.lease_s)
        try:
            attempt = start_attempt(self._db, self._store, claim, world_size, seen.cluster_id, self._clock())
        except CannotStart as error:
            return self._settle(claim, facts, move(facts.job, JobState.FAILED, ExitReason.SPEC_INVALID, str(error)))
        submit_attempt(self._db, self._launcher, claim, attempt, seen.cluster_id, self._clock())
        return self._later(SOON_S)

    def _mark_running(self, claim: Claim) -> None:
        with self._db.session() as session:
            job = guarded(session, claim)
            attempt = _last(session, job)
            attempt.state = AttemptState.RUNNING
            attempt.stop_requested_at = None
            message = f"All {attempt.world_size} workers of attempt {attempt.number} have reported"
            number = attempt.number
            transition(
                session, job, JobState.RUNNING, message=message, actor=RECONCILER, attempt=number, at=self._clock()
            )

    def _ask_to_leave(self, claim: Claim, order: AskToLeave) -> None:
        now = self._clock()
        with self._db.session() as session:
            job = guarded(session, claim)
            attempt = _last(session, job)
            attempt.stop_requested_at = attempt.stop_requested_at or now
            if order.reason == ExitReason.DEADLINE:
                job.desired = Desired.STOP
                attempt.kill_reason = ExitReason.DEADLINE
            if job.state != order.to:
                transition(
                    session,
                    job,
                    order.to,
                    reason=order.reason,
                    message=order.message,
                    actor=RECONCILER,
                    attempt=attempt.number,
                    at=now,
                )
            else:
                job.reason, job.message = order.reason, order.message

    def _withdraw(self, claim: Claim) -> None:
        """The job stays PAUSING until its workers have started (RUNNING) or the attempt has left (QUEUED)."""
        with self._db.session() as session:
            job = guarded(session, claim)
            _last(session, job).stop_requested_at = None
            job.reason, job.message = None, "Resumed before it had left its workers."

    def _kill(self, claim: Claim, kill: Kill) -> datetime:
        now = self._clock()
        with self._db.session() as session:
            job = guarded(session, claim)
            attempt = _last(session, job)
            attempt.kill_reason = attempt.kill_reason or kill.reason
            attempt_id, is_first = attempt.id, attempt.killed_at is None
            attempt.killed_at = now
            if is_first:
                data = {"reason": attempt.kill_reason}
                text = f"Attempt {attempt.number} is stopped by force: {kill.message}"
                record(session, job.id, "attempt.killed", text, RECONCILER, attempt=attempt.number, data=data, at=now)
        if not is_first:
            # Ray may take minutes to notice: no news for the job's history.
            log.warning("A driver is stopped by force again.", attempt=attempt_id, why=kill.message)
        # After the row: if we die in between, the next controller sees `killed_at` and stops it again in a while.
        self._launcher.stop(attempt_id)
        return self._later(SOON_S)

    def _reap(self, claim: Claim, facts: Facts, leftovers: tuple[str, ...]) -> datetime:
        assert facts.attempt is not None
        log.warning("An attempt's driver is gone, parts of it are not.", attempt=facts.attempt.id, leftovers=leftovers)
        self._launcher.reap(facts.attempt.id)
        message = f"Removing what is left of attempt {facts.attempt.number}: {', '.join(leftovers)[:500]}"
        self._note(claim, facts.job, Condition(QueueReason.WAITING_FOR_WORKERS, message))
        return self._later(REAP_LOOK_S)

    def _settle(self, claim: Claim, facts: Facts, following: Next) -> datetime | None:
        with self._db.session() as session:
            job = guarded(session, claim)
            if job.desired != facts.job.desired:
                return self._later(0.0)
            settle_job(session, job, following, self._clock())
            if job.kind == "search":
                release_trials(session, job, self._clock())
        return self._tidy(claim) if following.state.is_terminal else None

    def _end(self, claim: Claim, facts: Facts, end: End) -> datetime | None:
        if facts.attempt is not None:
            recover_measured(self._db, self._store, facts.attempt.id, guard=lambda session: guarded(session, claim))
        with self._db.session() as session:
            job = guarded(session, claim)
            if job.desired != facts.job.desired:
                # A user's order came in while we looked: what follows depends on it. Nothing is lost by looking again.
                return self._later(0.0)
            end_attempt(session, job, _last(session, job), end, self._clock())
            if job.kind == "search":
                release_trials(session, job, self._clock())
            recovers = job.state == JobState.RECOVERING
            delay_s = (job.not_before - self._clock()).total_seconds() if job.not_before is not None else 0.0
        self._observer.forget(claim.job_id)
        tidy_again_at = self._tidy(claim)
        if end.next.state.is_terminal:
            return tidy_again_at
        return self._later(delay_s) if recovers else None

    def _tidy(self, claim: Claim) -> datetime | None:
        """Retention and sweep, after each attempt and at the job's end; the job has already moved on. Returns when to
        do it again: None if it is done."""
        try:
            claim = renew(self._db, claim, self._clock(), self._settings.lease_s)
            apply_retention(self._db, self._store, claim.job_id, self._clock())
            sweep(self._db, self._store, claim.job_id)
        except StoreError as error:
            log.warning("Old checkpoints were not tidied up.", job=claim.job_id, detail=str(error))
            return self._clock() + timedelta(seconds=TIDY_AGAIN_S)
        return None

    # -- conditions ----------------------------------------------------------------------
    def _note(self, claim: Claim, job: JobRow, condition: Condition | None) -> None:
        """Show a condition on the job, or take the last one away. Writes only if that changes something."""
        if condition is None and job.reason not in _CONDITIONS:
            return
        shown = (condition.reason, condition.message) if condition is not None else (None, "")
        if (job.reason, job.message) == shown:
            return
        with self._db.session() as session:
            row = guarded(session, claim)
            if condition is not None and row.reason != condition.reason:
                data = {"reason": condition.reason}
                record(session, row.id, "job.condition", condition.message, RECONCILER, data=data, at=self._clock())
            row.reason, row.message = shown

    def _put_off(self, claim: Claim, error: Exception) -> datetime | None:
        """The store or the cluster failed half-way: a condition; what was begun is done again."""
        log.warning("A look at a job was put off.", job=claim.job_id, error=type(error).__name__, detail=str(error))
        try:
            with self._db.reader() as session:
                job = session.get_one(JobRow, claim.job_id)
            if not JobState(job.state).is_terminal:
                what = "object store" if isinstance(error, StoreError) else "Ray cluster"
                self._note(claim, job, Condition(QueueReason.CLUSTER_UNREACHABLE, f"The {what} does not answer."))
        except LeaseLost:
            return None
        return self._later(self._settings.poll_s)

    def _later(self, seconds: float) -> datetime:
        return self._clock() + timedelta(seconds=min(seconds, MAX_LOOK_S))


def _last(session: Session, job: JobRow) -> AttemptRow:
    newest = select(AttemptRow).where(AttemptRow.job_id == job.id).order_by(AttemptRow.number.desc()).limit(1)
    return session.scalars(newest).one()
