"""What to do next for one job: a pure function of its row, its last attempt, and what was just seen of it.

The rules, in order:

- **Unreachable is a condition, not a failure.** While the cluster does not answer, nothing is concluded.
- **Proof of death.** An attempt has ended when its driver is gone *and* nothing of it is left on the cluster, or when
  the cluster is another one. Only then may another attempt follow.
- An attempt that was written down but that the cluster does not know is submitted (again).
- What the attempt itself left in `exit.json` outranks what the cluster says of it.
- Force is used after the grace period of an order, when the workers do not start, when an attempt that reports makes no
  progress, and when a driver stays after it has said goodbye.

No clock, no I/O: `now` and the random share of the back-off are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from configs.reasons import ExitReason, QueueReason
from configs.states import AttemptState, Desired, JobState
from configs.wire import ExitFile
from orchestrator.control.launcher import JobStatus, LaunchState
from orchestrator.control.retries import Ended, Next, Policy, at_rest, follow, move
from orchestrator.settings import Settings
from orchestrator.storage.tables import AttemptRow, JobRow

RECOVERY_HOLD_S = 60.0
"""How long a recovering job keeps its reservation although the cluster has no room for it."""
EXIT_LINGER_S = 30.0
"""How long a driver may stay after it wrote exit.json."""
KILL_AGAIN_S = 20.0
REAP_LOOK_S = 1.0
SOON_S = 0.3
HANG_MARGIN_S = 20.0
"""The driver, which can name the rank that hangs, gets so much time to notice first."""

ORDERED_EXIT = {
    Desired.STOP: ExitReason.USER_CANCELLED,
    Desired.PAUSE: ExitReason.PAUSED,
    Desired.YIELD: ExitReason.PREEMPTED,
}


@dataclass(frozen=True)
class Observation:
    """What was seen before deciding. Fields that were not looked at keep their defaults."""

    watching_since: datetime
    """Since when this controller has been looking: silence before that proves nothing."""
    cluster_id: str | None = None
    """None: the cluster does not answer."""
    status: JobStatus | None = None
    """What the cluster says of the attempt's driver; None: not known."""
    exit: ExitFile | None = None
    leftovers: tuple[str, ...] | None = None
    """Live remains of an attempt whose driver is gone; None: not known."""
    newest_step: int | None = None
    """Step of the job's newest checkpoint that counts."""
    made_progress: bool = False
    """This attempt has committed a checkpoint."""
    previous: Ended | None = None
    """How the attempt before this one ended."""
    ran_s: float = 0.0
    """Running time of the job's earlier attempts."""
    num_rollbacks: int = 0
    """How many of them ended in a rollback."""
    fitting_world_size: int | None = None
    """With how many workers a recovering job could start now."""


# -- decisions ----------------------------------------------------------------------
class Condition(NamedTuple):
    """Something a user should know about a job whose state it does not change."""

    reason: QueueReason
    message: str


@dataclass(frozen=True)
class Wait:
    """Look again after so many seconds."""

    seconds: float
    condition: Condition | None = None


@dataclass(frozen=True)
class Launch:
    """Write down a new attempt and submit it."""

    world_size: int


@dataclass(frozen=True)
class Submit:
    """Submit the last attempt, which the cluster does not know."""


@dataclass(frozen=True)
class MarkRunning:
    """Every rank has reported."""


@dataclass(frozen=True)
class AskToLeave:
    """Move to PAUSING or STOPPING; the attempt hears of it in its next report's reply."""

    to: JobState
    reason: str
    message: str


@dataclass(frozen=True)
class Withdraw:
    """Forget an order to leave that the user took back before the attempt's workers had started."""


@dataclass(frozen=True)
class Kill:
    """Stop the driver by force. `reason`: what the attempt ended of, if it does not say itself."""

    reason: ExitReason | None
    message: str


@dataclass(frozen=True)
class Reap:
    """Remove what is left of an attempt whose driver is gone."""

    leftovers: tuple[str, ...]


@dataclass(frozen=True)
class End:
    """The attempt is proved gone: close it, and move the job."""

    reason: ExitReason
    message: str
    exit: ExitFile | None
    next: Next


@dataclass(frozen=True)
class Settle:
    """Move a job of which nothing runs."""

    next: Next


Decision = Wait | Launch | Submit | MarkRunning | AskToLeave | Withdraw | Kill | Reap | End | Settle


def decide(
    job: JobRow,
    attempt: AttemptRow | None,
    seen: Observation,
    now: datetime,
    settings: Settings,
    policy: Policy,
    jitter: float = 0.0,
) -> Decision:
    """The next thing to do for `job`, whose last attempt is `attempt`. `jitter` in [0, 1) spreads the back-off."""
    state = JobState(job.state)
    if state is JobState.QUEUED:
        return _decide_queued(job, settings)
    if state is JobState.PAUSED:
        return _decide_paused(job, settings)
    if attempt is None or attempt.state == AttemptState.ENDED:
        return _decide_between_attempts(job, seen, now, settings)
    return _decide_attempt(job, attempt, seen, now, settings, policy, jitter)


# -- nothing runs ----------------------------------------------------------------------
def _decide_queued(job: JobRow, settings: Settings) -> Decision:
    if job.desired == Desired.RUN:
        return Launch(job.start_workers) if job.start_workers is not None else Wait(settings.poll_s)
    return Settle(at_rest(job))


def _decide_paused(job: JobRow, settings: Settings) -> Decision:
    if job.desired == Desired.PAUSE:
        return Wait(settings.poll_s)
    if job.desired == Desired.STOP:
        return Settle(at_rest(job))
    return Settle(move(job, JobState.QUEUED, None, "Resumed.", desired=Desired.RUN))


def _decide_between_attempts(job: JobRow, seen: Observation, now: datetime, settings: Settings) -> Decision:
    """RECOVERING: the last attempt is gone, its workers are still reserved."""
    if job.desired != Desired.RUN:
        return Settle(at_rest(job))
    if job.not_before is not None and now < job.not_before:
        return Wait((job.not_before - now).total_seconds())
    if seen.cluster_id is None:
        return _unreachable(settings, "Cannot recover yet: the Ray cluster does not answer.")
    if seen.fitting_world_size is not None:
        return Launch(seen.fitting_world_size)
    waiting_since = max(job.not_before or job.state_since, job.state_since, seen.watching_since)
    if _elapsed(waiting_since, now) >= RECOVERY_HOLD_S:
        message = f"The cluster had no room to recover for {RECOVERY_HOLD_S:.0f} s; back in the queue."
        return Settle(move(job, JobState.QUEUED, QueueReason.WAITING_FOR_WORKERS, message))
    message = "Waits for room on the cluster to recover."
    return Wait(settings.poll_s, Condition(QueueReason.WAITING_FOR_WORKERS, message))


# -- an attempt that has not been proved gone ----------------------------------------------------------------------
def _decide_attempt(
    job: JobRow,
    attempt: AttemptRow,
    seen: Observation,
    now: datetime,
    settings: Settings,
    policy: Policy,
    jitter: float,
) -> Decision:
    if seen.cluster_id is None:
        return _unreachable(settings, "The Ray cluster does not answer; the attempt is left alone.")
    is_other_cluster = seen.cluster_id != attempt.cluster_id
    is_unknown = is_other_cluster or (seen.status is not None and seen.status.state is LaunchState.MISSING)
    if is_unknown and attempt.claim_nonce is None and seen.exit is None:
        # Its driver never spoke: either the submission was lost, or the cluster was before the driver began.
        if job.desired == Desired.RUN:
            return Submit()
        return conclude(
            job, attempt, ORDERED_EXIT[Desired(job.desired)], "It had not begun.", seen, policy, settings, jitter
        )
    if is_other_cluster:
        message = f"The Ray cluster {attempt.cluster_id} was replaced by {seen.cluster_id}."
        return conclude(job, attempt, ExitReason.CLUSTER_LOST, message, seen, policy, settings, jitter)
    if seen.status is None:
        return _unreachable(settings, "The Ray cluster does not answer; the attempt is left alone.")
    if not is_unknown and not seen.status.state.is_terminal:
        return _decide_alive(job, attempt, seen, now, settings, policy)
    if seen.leftovers is None:
        return _unreachable(settings, "The Ray cluster does not say what is left of the attempt.")
    if seen.leftovers:
        return Reap(seen.leftovers)
    reason, message = _unsaid_reason(job, attempt, seen.status)
    return conclude(job, attempt, reason, message, seen, policy, settings, jitter)


def _decide_alive(
    job: JobRow, attempt: AttemptRow, seen: Observation, now: datetime, settings: Settings, policy: Policy
) -> Decision:
    """The cluster says that the driver waits or runs."""
    if attempt.killed_at is not None:
        if _elapsed(attempt.killed_at, now) < KILL_AGAIN_S:
            return Wait(SOON_S)
        # Ray ignores the stop of a job that is still pending.
        return Kill(_kill_reason(attempt), "The driver is still there; stopped again.")
    if seen.exit is not None:
        if _elapsed(max(seen.exit.ended_at, seen.watching_since), now) < EXIT_LINGER_S:
            return Wait(SOON_S)
        return Kill(None, "The driver stayed after it had written how the attempt ended.")
    if job.desired != Desired.RUN:
        return _decide_leaving(job, attempt, seen, now, settings)
    expected = policy.num_reporters or attempt.world_size
    is_ready = len(attempt.ranks) >= expected
    if attempt.stop_requested_at is not None and not is_ready:
        # The next order's grace begins with that order.
        return Withdraw()
    if policy.deadline_s is not None and seen.ran_s + _elapsed(attempt.created_at, now) > policy.deadline_s:
        message = f"The deadline of {policy.deadline_s:g} s of running time has passed."
        return AskToLeave(JobState.STOPPING, ExitReason.DEADLINE, message)
    if not is_ready:
        started = max(attempt.submitted_at or attempt.created_at, seen.watching_since)
        if _elapsed(started, now) > settings.start_timeout_s:
            heard = f"{len(attempt.ranks)} of {expected} workers have reported"
            return Kill(ExitReason.START_TIMEOUT, f"After {settings.start_timeout_s:.0f} s {heard}.")
        return Wait(settings.poll_s)
    if job.state != JobState.RUNNING:
        return MarkRunning()
    return _decide_training(attempt, seen, now, settings)


def _decide_training(attempt: AttemptRow, seen: Observation, now: datetime, settings: Settings) -> Decision:
    last_report = attempt.last_report_at or attempt.created_at
    if _elapsed(max(last_report, seen.watching_since), now) > settings.report_timeout_s:
        # Cut off from us, it trains and commits on; only the cluster's word or an order of a user ends it.
        message = f"No report since {last_report:%H:%M:%S} UTC; the cluster says that the driver runs."
        return _unreachable(settings, message)
    # Both times are set by the same process: however late a report is delivered, and however long the API was away,
    # only an attempt that keeps reporting the same step is called hung.
    progress = attempt.last_progress_at or last_report
    if attempt.phase == "training" and _elapsed(progress, last_report) > settings.hang_timeout_s + HANG_MARGIN_S:
        message = f"Step {attempt.to_step} has lasted {_elapsed(progress, last_report):.0f} s."
        return Kill(ExitReason.WORKER_HUNG, message)
    return Wait(settings.poll_s)


def _decide_leaving(job: JobRow, attempt: AttemptRow, seen: Observation, now: datetime, settings: Settings) -> Decision:
    """A user or the scheduler wants it to leave: order, grace, force."""
    desired = Desired(job.desired)
    reason = ORDERED_EXIT[desired]
    to = JobState.STOPPING if desired is Desired.STOP else JobState.PAUSING
    if attempt.stop_requested_at is None or (to is JobState.STOPPING and job.state != JobState.STOPPING):
        message = {Desired.STOP: "Cancelling.", Desired.PAUSE: "Pausing.", Desired.YIELD: "Yielding its workers."}
        return AskToLeave(to, reason, message[desired])
    if _elapsed(max(attempt.stop_requested_at, seen.watching_since), now) < settings.stop_grace_s:
        return Wait(min(settings.poll_s, SOON_S))
    return Kill(reason, f"It did not leave within {settings.stop_grace_s:.0f} s.")


def _kill_reason(attempt: AttemptRow) -> ExitReason | None:
    return ExitReason(attempt.kill_reason) if attempt.kill_reason else None


def _unsaid_reason(job: JobRow, attempt: AttemptRow, status: JobStatus) -> tuple[ExitReason, str]:
    """Why an attempt ended that is gone, if it left no exit file."""
    said = f": {status.message}" if status.message else ""
    kill_reason = _kill_reason(attempt)
    if kill_reason is not None:
        return kill_reason, f"Stopped by force{said}"
    if attempt.stop_requested_at is not None and job.desired != Desired.RUN:
        return ORDERED_EXIT[Desired(job.desired)], f"It left without a word{said}"
    return ExitReason.DRIVER_LOST, f"The driver is gone and left no word ({status.state}){said}"


def conclude(
    job: JobRow,
    attempt: AttemptRow,
    reason: ExitReason,
    message: str,
    seen: Observation,
    policy: Policy,
    settings: Settings,
    jitter: float,
) -> End:
    """The end of an attempt that is gone. `reason` is what we conclude; the attempt's own word counts more, unless we
    ended it."""
    said = seen.exit
    if said is not None and (attempt.kill_reason is None or said.reason is ExitReason.COMPLETED):
        reason, message = said.reason, said.message
    if attempt.kill_reason == ExitReason.DEADLINE and reason is not ExitReason.COMPLETED:
        # However it went in the end, the deadline is why it had to.
        reason, message = ExitReason.DEADLINE, f"The deadline has passed. {message}"
    if reason is ExitReason.COMPLETED and policy.is_training and (seen.newest_step or 0) < (job.total_steps or 0):
        reason = ExitReason.STORAGE_ERROR
        message = f"It completed, but its last checkpoint (step {job.total_steps}) is not in the object store."
    last_step = max(attempt.to_step, said.last_step if said else 0)
    ended = Ended(
        reason,
        message,
        error_type(said),
        made_progress=seen.made_progress,
        made_a_step=last_step > attempt.from_step,
        last_step=last_step,
        num_rollbacks=seen.num_rollbacks,
    )
    return End(reason, message, said, follow(job, ended, seen.previous, policy, settings, jitter))


def error_type(exit: ExitFile | None) -> str:
    """The class of the error that the first failed rank named; empty if none did."""
    return exit.first_failure.error_type if exit is not None and exit.first_failure is not None else ""


def _unreachable(settings: Settings, message: str) -> Wait:
    return Wait(settings.poll_s, Condition(QueueReason.CLUSTER_UNREACHABLE, message))


def _elapsed(start: datetime, end: datetime) -> float:
    return (end - start) / timedelta(seconds=1)
