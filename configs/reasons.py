"""Why an attempt ended and why a job waits: one table, read by everyone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from configs.states import JobState

RetryClass = Literal["never", "user", "infra", "free", "rollback"]
"""never: no new attempt; user: while retry.max_user_failures lasts; infra: while retry.max_infra_failures lasts
(refilled by progress); free: a new attempt that costs nothing; rollback: while train.spike_rollback.max_rollbacks
lasts."""


class ExitReason(StrEnum):
    COMPLETED = "COMPLETED"
    USER_CANCELLED = "USER_CANCELLED"
    PAUSED = "PAUSED"
    PREEMPTED = "PREEMPTED"
    USER_ERROR = "USER_ERROR"
    SPEC_INVALID = "SPEC_INVALID"
    DATA_ERROR = "DATA_ERROR"
    NAN_LOSS = "NAN_LOSS"
    LOSS_SPIKE = "LOSS_SPIKE"
    OOM_GPU = "OOM_GPU"
    OOM_HOST = "OOM_HOST"
    WORKER_LOST = "WORKER_LOST"
    WORKER_HUNG = "WORKER_HUNG"
    DRIVER_LOST = "DRIVER_LOST"
    NODE_LOST = "NODE_LOST"
    CLUSTER_LOST = "CLUSTER_LOST"
    START_TIMEOUT = "START_TIMEOUT"
    STORAGE_ERROR = "STORAGE_ERROR"
    STORAGE_REFUSED = "STORAGE_REFUSED"
    CHECKPOINT_CORRUPT = "CHECKPOINT_CORRUPT"
    FENCED = "FENCED"
    CRASH_LOOP = "CRASH_LOOP"
    DEADLINE = "DEADLINE"
    DEPENDENCY_FAILED = "DEPENDENCY_FAILED"
    STOPPED_EARLY = "STOPPED_EARLY"
    SEARCH_ENDED = "SEARCH_ENDED"
    METRIC_MISSING = "METRIC_MISSING"
    PLATFORM_ERROR = "PLATFORM_ERROR"


@dataclass(frozen=True)
class ReasonRow:
    final_state: JobState
    """The job's state if no new attempt follows."""
    retry: RetryClass
    advice: str
    """What the user can do next. Shown with a job that has ended so, and with each attempt that did."""


_GO_ON = "`patchwork retry` goes on from the last checkpoint"
_F, _C, _S = JobState.FAILED, JobState.CANCELLED, JobState.SUCCEEDED
EXIT_REASONS: dict[ExitReason, ReasonRow] = {
    ExitReason.COMPLETED: ReasonRow(_S, "never", "Fetch the checkpoint with `patchwork fetch`."),
    ExitReason.USER_CANCELLED: ReasonRow(_C, "never", "Start again from the last checkpoint with `patchwork retry`."),
    ExitReason.PAUSED: ReasonRow(JobState.PAUSED, "free", "Resume the job when you wish."),
    ExitReason.PREEMPTED: ReasonRow(_F, "free", "Nothing to do: it continues when its turn comes."),
    ExitReason.USER_ERROR: ReasonRow(
        _F, "user", f"Read the error and the last lines of the rank that failed first, mend it, then {_GO_ON}."
    ),
    ExitReason.SPEC_INVALID: ReasonRow(_F, "never", "Correct the field that the error names and submit again."),
    ExitReason.DATA_ERROR: ReasonRow(
        _F,
        "user",
        "Repair the data set that the error names, under the data root of every node (or choose another with "
        f"data.source), then {_GO_ON}.",
    ),
    ExitReason.NAN_LOSS: ReasonRow(
        _F,
        "user",
        "Lower optim.lr, lengthen schedule.warmup_steps, or clip gradients (optim.clip_grad_norm: 1); submit again.",
    ),
    ExitReason.LOSS_SPIKE: ReasonRow(
        _F,
        "rollback",
        "Every rollback met another spike: lower optim.lr, lengthen the warm-up, or clip gradients "
        "(optim.clip_grad_norm: 1).",
    ),
    ExitReason.OOM_GPU: ReasonRow(
        _F,
        "user",
        "Halve train.micro_batch_size, or turn on train.activation_checkpointing, or raise zero.stage, and submit "
        "again.",
    ),
    ExitReason.OOM_HOST: ReasonRow(
        _F,
        "infra",
        "Lower data.loader_workers or resources.workers, raise zero.stage, or give the nodes more memory; then submit "
        f"again, or {_GO_ON}.",
    ),
    ExitReason.WORKER_LOST: ReasonRow(
        _F,
        "infra",
        "A worker's process vanished: its last lines and its node's kernel log (dmesg) may say why. When the node is "
        f"well, {_GO_ON}.",
    ),
    ExitReason.WORKER_HUNG: ReasonRow(
        _F,
        "infra",
        "A rank made no progress: its stacks are the last lines of its log. Where it waited for data, look at the data "
        f"root; in a collective, at the network between the nodes. Then {_GO_ON}.",
    ),
    ExitReason.DRIVER_LOST: ReasonRow(
        _F,
        "infra",
        f"The attempt's driver vanished: look at memory and log of the cluster's head node, then {_GO_ON}.",
    ),
    ExitReason.NODE_LOST: ReasonRow(
        _F, "infra", f"A node left the cluster: bring it back or do without it (`patchwork cluster`), then {_GO_ON}."
    ),
    ExitReason.CLUSTER_LOST: ReasonRow(
        _F,
        "infra",
        "The Ray cluster went away and another took its place: find out why its head ended (`patchwork cluster` shows "
        f"the new one), then {_GO_ON}.",
    ),
    ExitReason.START_TIMEOUT: ReasonRow(
        _F,
        "infra",
        "The workers did not all start: see in `patchwork cluster` whether its nodes have room for resources.workers, "
        f"and in the driver's log what they waited for (`patchwork logs --stream driver`); then {_GO_ON}.",
    ),
    ExitReason.STORAGE_ERROR: ReasonRow(
        _F, "infra", f"The object store could not be used: check that it answers and has room, then {_GO_ON}."
    ),
    ExitReason.STORAGE_REFUSED: ReasonRow(
        _F,
        "user",
        f"The object store refused the workers: mend their keys, policy or bucket, then {_GO_ON}.",
    ),
    ExitReason.CHECKPOINT_CORRUPT: ReasonRow(
        _F,
        "infra",
        f"A checkpoint failed verification: check the object store's disks; {_GO_ON} before that one.",
    ),
    ExitReason.FENCED: ReasonRow(_F, "infra", "Nothing to do: a newer attempt took over, and this one stopped itself."),
    ExitReason.CRASH_LOOP: ReasonRow(
        _F, "never", f"The same failure came back without progress: mend what its error names, then {_GO_ON}."
    ),
    ExitReason.DEADLINE: ReasonRow(
        _F, "never", f"Submit again with a larger queue.deadline_s, or {_GO_ON} with as much time again."
    ),
    ExitReason.DEPENDENCY_FAILED: ReasonRow(
        _C,
        "never",
        "A job in queue.depends_on ended without success: retry that one, then submit this with its new id.",
    ),
    ExitReason.STOPPED_EARLY: ReasonRow(
        _C, "never", "Nothing to do: the search that this trial is of stopped it. Its message says by which rule."
    ),
    ExitReason.SEARCH_ENDED: ReasonRow(
        _C, "never", "Nothing to do with this trial: go on with its search by `patchwork retry` of that one."
    ),
    ExitReason.METRIC_MISSING: ReasonRow(
        _F, "never", "Choose a metric that the trials report and that is a finite number, and submit the search again."
    ),
    ExitReason.PLATFORM_ERROR: ReasonRow(
        _F, "infra", "This is a fault of Patchwork; please report it with the job's id and the last lines of its log."
    ),
}


class QueueReason(StrEnum):
    """Why a job waits (after Kueue's names)."""

    WAITING_FOR_WORKERS = "WAITING_FOR_WORKERS"
    EXCEEDS_CLUSTER = "EXCEEDS_CLUSTER"
    BEHIND_HIGHER_PRIORITY = "BEHIND_HIGHER_PRIORITY"
    BEHIND_OLDER = "BEHIND_OLDER"
    DEPENDENCY = "DEPENDENCY"
    PLACEMENT_IMPOSSIBLE = "PLACEMENT_IMPOSSIBLE"
    CLUSTER_UNREACHABLE = "CLUSTER_UNREACHABLE"
    BACKING_OFF = "BACKING_OFF"
