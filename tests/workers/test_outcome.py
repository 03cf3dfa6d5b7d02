from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from configs.reasons import ExitReason
from workers.checkpoint import CheckpointMismatch
from workers.data.errors import DataError
from workers.outcome import JobError, RankOutcome, outcome_of
from workers.shards import CheckpointCorrupt
from workers.store import AlreadyExists, NotFound, StorageError

CAUSES = [
    (DataError("no images"), ExitReason.DATA_ERROR),
    (CheckpointCorrupt("a/b", "torn"), ExitReason.CHECKPOINT_CORRUPT),
    (CheckpointMismatch("other model"), ExitReason.SPEC_INVALID),
    (JobError("model: no"), ExitReason.SPEC_INVALID),
    (StorageError("away"), ExitReason.STORAGE_ERROR),
    (NotFound("key"), ExitReason.STORAGE_ERROR),
    (AlreadyExists("key"), ExitReason.STORAGE_ERROR),
    (torch.OutOfMemoryError("CUDA out of memory"), ExitReason.OOM_GPU),
    (MemoryError(), ExitReason.OOM_HOST),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ExitReason.OOM_HOST),
    (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), ExitReason.WORKER_LOST),
    (dist.DistNetworkError("timed out"), ExitReason.WORKER_LOST),
    (RuntimeError("shapes do not match"), ExitReason.PLATFORM_ERROR),
    (ValueError("something of ours"), ExitReason.PLATFORM_ERROR),
]


@pytest.mark.parametrize(("error", "reason"), CAUSES, ids=lambda value: getattr(value, "name", type(value).__name__))
def test_each_cause_has_its_reason(error: Exception, reason: ExitReason) -> None:
    outcome = outcome_of(error, step=7)
    assert outcome == RankOutcome(reason, str(error) or "MemoryError", 7, None, type(error).__name__)
