"""A hybrid and a BiT ResNet whose worker is killed with SIGKILL: the weights end as they would have, bit for bit. Every
ZeRO stage of both, without Ray, is in tests/workers/test_families_killed.py."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest

from orchestrator.client import Client
from tests.stack.jobs import final_weights, finished, pretraining, series

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]  # the fixture waits for four jobs

FAMILIES: dict[str, dict[str, Any]] = {
    "hybrid": {
        "patch_size": 1,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
        "mlp_dim": 64,
        "image_size": 28,
        "in_channels": 1,
        "dropout": 0.1,
        "stem": {"layers": [1], "width": 32},
    },
    "bit": {"resnet": {"layers": [1, 1], "width": 32}, "image_size": 28, "in_channels": 1},
}
VARIANTS = [("hybrid", 3), ("bit", 2)]
STEPS, EVERY, KILLED_FROM = 150, 20, 30
DEADLINE_S = 400.0


@pytest.fixture(scope="module")
def jobs(client: Client) -> dict[tuple[str, int], tuple[str, str]]:
    """The ids of each variant's undisturbed job and of the one whose rank 1 was killed; all have succeeded."""
    submitted = {}
    for family, stage in VARIANTS:
        spec = pretraining(zero__stage=stage, schedule__total_steps=STEPS, checkpoint__every_steps=EVERY)
        spec |= {"model": FAMILIES[family], "eval": {"at_end": False}}
        spec["train"]["global_batch_size"] = 32
        pair = [client.jobs.create(spec | {"name": f"{family}-{stage}-{what}"}).id for what in ("whole", "killed")]
        submitted[family, stage] = (pair[0], pair[1])
    waiting = {killed for _, killed in submitted.values()}
    end = time.monotonic() + DEADLINE_S
    while waiting:
        assert time.monotonic() < end, f"not killed in time: {waiting}"
        waiting -= {job_id for job_id in waiting if killed_now(client, job_id)}
        time.sleep(0.05)
    for job_id in (job_id for pair in submitted.values() for job_id in pair):
        finished(client, job_id, max(end - time.monotonic(), 1.0))
    return submitted


def killed_now(client: Client, job_id: str) -> bool:
    """Kill the job's rank 1 if it is past its first checkpoint: whether it was."""
    job = client.jobs.get(job_id)
    assert not job.is_terminal, f"{job.state} {job.reason}: {job.message}"
    if not job.attempts or job.attempts[-1].state == "ENDED" or job.attempts[-1].to_step < KILLED_FROM:
        return False
    os.kill(next(rank.pid for rank in job.attempts[-1].ranks if rank.rank == 1), signal.SIGKILL)
    return True


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_killed_worker_changes_nothing(
    client: Client, jobs: dict[tuple[str, int], tuple[str, str]], variant: tuple[str, int]
) -> None:
    whole, killed = jobs[variant]
    first, second = client.jobs.get(killed).attempts
    assert (first.exit_reason, first.first_failure and first.first_failure.rank) == ("WORKER_LOST", 1)
    assert second.exit_reason == "COMPLETED"
    assert second.from_step >= EVERY
    losses = series(client, whole, "train/loss")
    assert len(losses) == STEPS
    assert series(client, killed, "train/loss") == losses
    expected, weights = final_weights(client, whole), final_weights(client, killed)
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[key], expected[key]) for key in weights)
