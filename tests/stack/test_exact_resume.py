"""kill -9 a worker in the middle of a step: the same samples, the same weights, bit for bit, and an honest bill."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from orchestrator.client import Client
from tests.stack.jobs import final_weights, finished, pretraining, running_attempt, series

pytestmark = pytest.mark.stack


def test_a_killed_worker_changes_nothing_but_the_bill(client: Client) -> None:
    spec = pretraining(schedule__total_steps=400, checkpoint__every_steps=100)
    undisturbed = client.jobs.create(spec | {"name": "undisturbed"})
    finished(client, undisturbed.id)

    job = client.jobs.create(spec | {"name": "killed"})
    # Past the first checkpoint, and away from the next one.
    attempt = running_attempt(client, job.id, step=130)
    victim = next(rank for rank in attempt.ranks if rank.rank == 1)
    os.kill(victim.pid, signal.SIGKILL)
    job = finished(client, job.id)

    first, second = job.attempts
    assert (first.exit_reason, first.first_failure and first.first_failure.rank) == ("WORKER_LOST", 1)
    assert second.exit_reason == "COMPLETED"
    assert second.from_step in (100, 200, 300)

    # The same samples in the same order, at every step, on both ranks.
    for rank in (0, 1):
        name = f"data/sample_ids_crc32/rank-{rank:05d}"
        expected = series(client, undisturbed.id, name)
        assert len(expected) == 400
        assert series(client, job.id, name) == expected
    assert series(client, job.id, "train/loss") == series(client, undisturbed.id, "train/loss")

    # The same weights and moments, bit for bit.
    expected_weights, weights = final_weights(client, undisturbed.id), final_weights(client, job.id)
    assert weights.keys() == expected_weights.keys()
    assert all(np.array_equal(weights[k], expected_weights[k]) for k in weights)

    # What was done twice is what the bill says.
    assert first.to_step > second.from_step
    assert job.usage.wasted_steps == first.wasted_steps == first.to_step - second.from_step
    seconds_per_step = job.usage.wasted_gpu_s / job.usage.wasted_steps / 2
    assert 0.0 < seconds_per_step < 2.0
    assert client.jobs.get(undisturbed.id).usage.wasted_gpu_s == 0.0
