"""How a rank's part of an attempt ended: a value, never an exception: nobody has to guess from a stack trace."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configs.reasons import ExitReason
from workers.checkpoint import CheckpointMismatch
from workers.data.errors import DataError
from workers.shards import CheckpointCorrupt
from workers.store import StoreError, StoreRefused

# gloo and NCCL report a lost peer as a plain RuntimeError.
_LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Timed out waiting", re.IGNORECASE)
_NO_HOST_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|Cannot allocate memory|not enough memory")


@dataclass(frozen=True)
class RankOutcome:
    """What a rank says last."""

    reason: ExitReason
    message: str = ""
    step: int = 0
    """Optimizer steps done."""
    checkpoint_step: int | None = None
    """The newest step this rank knows to be committed by this attempt."""
    error_type: str = ""
    sound_step: int | None = None
    """After a loss spike: weights beyond this step are not known to be sound."""


class JobError(ValueError):
    """The job asks for something that cannot be done; the message names the field."""


def outcome_of(error: Exception, step: int) -> RankOutcome:
    """The outcome of a rank that failed with `error`.

    No code of a user runs here, so what is none of the known causes is our fault: PLATFORM_ERROR. A rank that lost its
    peers says WORKER_LOST; the driver looks for the one that went first.
    """
    text = str(error) or type(error).__name__
    if _is_compiler(error):
        text = f"train.compile: the model could not be compiled on this node; set it to false, or mend this: {text}"
    return RankOutcome(_reason(error), text, step, None, type(error).__name__)


def _is_compiler(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def _reason(error: Exception) -> ExitReason:
    text = str(error)
    match error:
        case DataError():
            return ExitReason.DATA_ERROR
        case CheckpointCorrupt():
            return ExitReason.CHECKPOINT_CORRUPT
        case CheckpointMismatch() | JobError():
            return ExitReason.SPEC_INVALID
        case _ if _is_compiler(error):
            return ExitReason.SPEC_INVALID
        case StoreRefused():
            return ExitReason.STORAGE_REFUSED
        case StoreError():
            return ExitReason.STORAGE_ERROR
        case torch.OutOfMemoryError():
            return ExitReason.OOM_GPU
        case MemoryError():
            return ExitReason.OOM_HOST
        case dist.DistError():
            return ExitReason.WORKER_LOST
        case RuntimeError() if _NO_HOST_MEMORY.search(text):
            return ExitReason.OOM_HOST
        case RuntimeError() if _LOST_PEER.search(text):
            return ExitReason.WORKER_LOST
        case _:
            return ExitReason.PLATFORM_ERROR
