"""What follows an attempt that has ended: the job's next state, what it costs of which budget, and when.

The reasons and their retry classes are one table, `configs.reasons`. Pure: no clock, no I/O.

- never: the job ends.
- user: a new attempt while `retry.max_user_failures` lasts; none by default.
- infra: a new attempt while fewer than `retry.max_infra_failures` came in a row without a new checkpoint in between.
- free: back in the queue, at no cost (preempted, paused).
- rollback: a new attempt from before the loss spiked, while `train.spike_rollback.max_rollbacks` lasts.

Twice the same failure without progress is a crash loop: trying a third time would only cost more.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.reasons import EXIT_REASONS, ExitReason
from configs.states import Desired, JobState
from orchestrator.settings import Settings
from orchestrator.storage.tables import JobRow


@dataclass(frozen=True)
class Policy:
    """What the job's spec says of retries and time."""

    is_training: bool = True
    max_user_failures: int = 0
    max_infra_failures: int = 10
    deadline_s: float | None = None
    max_rollbacks: int = 0
    num_reporters: int | None = None
    """How many processes report when it runs; None: every worker. Of a search only its driver does."""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended, and whether it gained anything."""

    reason: ExitReason
    message: str = ""
    error_type: str = ""
    """The class of the error that the first failed rank named; empty if none did."""
    made_progress: bool = False
    """It committed a checkpoint."""
    made_a_step: bool = False
    last_step: int = 0
    num_rollbacks: int = 0
    """How many attempts of the job before this one ended in a rollback."""


@dataclass(frozen=True)
class Next:
    """Where the job goes once nothing of it runs."""

    state: JobState
    reason: str | None
    message: str
    delay_s: float = 0.0
    user_failures: int = 0
    infra_failures: int = 0
    desired: Desired | None = None
    """What `desired` becomes; None: unchanged."""


def follow(
    job: JobRow, ended: Ended, before: Ended | None, policy: Policy, settings: Settings, jitter: float = 0.0
) -> Next:
    """Where `job` goes after an attempt that `ended`; `before` is the attempt before that one.

    A completion wins over every order, an order over every failure that would be retried.
    """
    reason, message = ended.reason, ended.message
    if reason is ExitReason.COMPLETED:
        return move(job, JobState.SUCCEEDED, reason, message or "Completed.")
    if reason is ExitReason.DEADLINE:
        return move(job, JobState.FAILED, reason, message)
    if job.desired == Desired.STOP:
        return at_rest(job)
    if reason is ExitReason.USER_CANCELLED:
        # Nobody of ours told it to: somebody stopped the driver. That is a loss, not the user's will.
        reason = ExitReason.DRIVER_LOST
    row = EXIT_REASONS[reason]
    if job.desired != Desired.RUN and row.retry in ("free", "infra", "rollback"):
        return at_rest(job)
    if row.retry == "free":
        return move(job, JobState.QUEUED, None, message or "Back in the queue.", desired=Desired.RUN)
    if row.retry == "never":
        return move(job, row.final_state, reason, message)
    if row.retry == "rollback":
        # Not a failure of anything: no back-off, and no loop either, since it goes on with other data.
        text = f"Rollback {ended.num_rollbacks + 1} of {policy.max_rollbacks}: {message}"
        is_left = ended.num_rollbacks < policy.max_rollbacks
        return move(job, JobState.RECOVERING, reason, text) if is_left else move(job, row.final_state, reason, message)
    if is_crash_loop(ended, before):
        text = f"The same failure twice in a row without progress ({reason}): {message}"
        return move(job, JobState.FAILED, ExitReason.CRASH_LOOP, text)
    return _retry_or_fail(job, reason, ended, policy, settings, jitter)


def at_rest(job: JobRow) -> Next:
    """Where a job goes of which nothing runs and which is not wanted to run."""
    if job.desired == Desired.STOP:
        if job.reason == ExitReason.DEPENDENCY_FAILED:
            return move(job, JobState.CANCELLED, ExitReason.DEPENDENCY_FAILED, job.message)
        return move(job, JobState.CANCELLED, ExitReason.USER_CANCELLED, "Cancelled.")
    if job.desired == Desired.PAUSE:
        return move(job, JobState.PAUSED, ExitReason.PAUSED, "Paused.")
    return move(job, JobState.QUEUED, None, "Back in the queue.", desired=Desired.RUN)


def move(job: JobRow, state: JobState, reason: str | None, message: str, *, desired: Desired | None = None) -> Next:
    """A move that costs nothing."""
    return Next(state, reason, message, 0.0, job.user_failures, job.infra_failures, desired)


def is_crash_loop(ended: Ended, before: Ended | None) -> bool:
    """Twice the same failure, and nothing gained in between.

    For losses of infrastructure only if both attempts named the same error at the same step, or before their first: two
    lost nodes in a row are bad luck, two identical exceptions at one place are not.
    """
    if before is None or (before.reason, before.error_type) != (ended.reason, ended.error_type):
        return False
    if before.made_progress or ended.made_progress:
        return False
    if EXIT_REASONS[ended.reason].retry == "user":
        return True
    stepped = before.made_a_step or ended.made_a_step
    return bool(ended.error_type) and (not stepped or before.last_step == ended.last_step)


def backoff_s(failures: int, settings: Settings, jitter: float) -> float:
    """Seconds before the next attempt: doubling from the initial value up to the limit, then spread by +-20 %."""
    delay = min(settings.backoff_max_s, settings.backoff_initial_s * 2.0 ** (failures - 1))
    return delay * (0.8 + 0.4 * jitter)


def _retry_or_fail(
    job: JobRow, reason: ExitReason, ended: Ended, policy: Policy, settings: Settings, jitter: float
) -> Next:
    user, infra = job.user_failures, job.infra_failures
    if EXIT_REASONS[reason].retry == "user":
        user += 1
        failures, budget = user, policy.max_user_failures
    else:
        # The budget is for losses in a row: one that came after a new checkpoint starts the count again.
        infra = 1 if ended.made_progress else infra + 1
        failures, budget = infra, policy.max_infra_failures
    if failures > budget:
        return Next(JobState.FAILED, reason, ended.message, 0.0, user, infra)
    message = f"{reason}: {ended.message}" if ended.message else str(reason)
    return Next(JobState.RECOVERING, reason, message, backoff_s(failures, settings, jitter), user, infra)
