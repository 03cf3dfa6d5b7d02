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
    PLATFORM_ERROR = "PLATFORM_ERROR"


@dataclass(frozen=True)
class ReasonRow:
    final_state: JobState
    """The job's state if no new attempt follows."""
    retry: RetryClass
    advice: str
    """What the user can do next, in one sentence."""


_F, _C, _S = JobState.FAILED, JobState.CANCELLED, JobState.SUCCEEDED
EXIT_REASONS: dict[ExitReason, ReasonRow] = {
    ExitReason.COMPLETED: ReasonRow(_S, "never", "Fetch the checkpoint with `patchwork fetch`."),
    ExitReason.USER_CANCELLED: ReasonRow(_C, "never", "Start again from the last checkpoint with `patchwork retry`."),
    ExitReason.PAUSED: ReasonRow(JobState.PAUSED, "free", "Resume the job when you wish."),
    ExitReason.PREEMPTED: ReasonRow(_F, "free", "Nothing to do: it continues when its turn comes."),
    ExitReason.USER_ERROR: ReasonRow(_F, "user", "Read the error and the last lines of the rank that failed first."),
    ExitReason.SPEC_INVALID: ReasonRow(_F, "never", "Correct the field that the error names and submit again."),
    ExitReason.DATA_ERROR: ReasonRow(_F, "user", "Check that the data set is complete under the node's data root."),
    ExitReason.NAN_LOSS: ReasonRow(
        _F, "user", "Lower optim.lr, lengthen the warm-up, or clip gradients (optim.clip_grad_norm: 1)."
    ),
    ExitReason.LOSS_SPIKE: ReasonRow(
        _F,
        "rollback",
        "Every rollback met another spike: lower optim.lr, lengthen the warm-up, or clip gradients "
        "(optim.clip_grad_norm: 1).",
    ),
    ExitReason.OOM_GPU: ReasonRow(
        _F, "user", "Halve train.micro_batch_size, or turn on train.activation_checkpointing, or raise zero.stage."
    ),
    ExitReason.OOM_HOST: ReasonRow(_F, "infra", "Lower data.loader_workers or ask for fewer workers on a node."),
    ExitReason.WORKER_LOST: ReasonRow(_F, "infra", "A worker process vanished; see the node's health."),
    ExitReason.WORKER_HUNG: ReasonRow(_F, "infra", "A rank made no progress; see the rank named in the error."),
    ExitReason.DRIVER_LOST: ReasonRow(_F, "infra", "The attempt's driver vanished; see the cluster's head."),
    ExitReason.NODE_LOST: ReasonRow(_F, "infra", "A node left the cluster."),
    ExitReason.CLUSTER_LOST: ReasonRow(_F, "infra", "The Ray cluster was replaced by another one."),
    ExitReason.START_TIMEOUT: ReasonRow(_F, "infra", "The workers did not start in time; see `patchwork cluster`."),
    ExitReason.STORAGE_ERROR: ReasonRow(
        _F, "infra", "The object store could not be used; check its health and credentials."
    ),
    ExitReason.STORAGE_REFUSED: ReasonRow(
        _F,
        "user",
        "The object store refused the workers: mend their keys, policy or bucket, then `patchwork retry` goes on from "
        "the last checkpoint.",
    ),
    ExitReason.CHECKPOINT_CORRUPT: ReasonRow(
        _F, "infra", "A checkpoint failed verification; the one before it is used."
    ),
    ExitReason.FENCED: ReasonRow(_F, "infra", "A newer attempt took over; this one stopped itself."),
    ExitReason.CRASH_LOOP: ReasonRow(_F, "never", "The same failure came back without progress; read its error."),
    ExitReason.DEADLINE: ReasonRow(_F, "never", "Raise queue.deadline_s, or retry from the last checkpoint."),
    ExitReason.DEPENDENCY_FAILED: ReasonRow(
        _C,
        "never",
        "A job in queue.depends_on ended without success: retry that one, then submit this with its new id.",
    ),
    ExitReason.PLATFORM_ERROR: ReasonRow(
        _F, "infra", "This is a fault of Patchwork; please report it with the job's id."
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
