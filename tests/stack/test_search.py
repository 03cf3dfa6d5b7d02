"""Searches on real parts: Ray Tune, plain actors, real images."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.client import Client
from tests.stack.jobs import finished, pretraining

pytestmark = pytest.mark.stack


def searching(**fields: Any) -> dict[str, Any]:
    """A search over the learning rate of a tiny model: trials of one worker and 16 steps."""
    base = pretraining(
        schedule={"total_steps": 16, "warmup_steps": 2},
        resources={"workers": 1, "gpus_per_worker": 0},
        checkpoint={"every_steps": 8, "keep_last": 2},
        eval={"every_steps": 8, "batch_size": 500},
        data__holdout={"fraction": 0.1},
        data__subset=None,
        data__augment={"crop": "resize"},
        zero={"stage": 0},
    )
    return {
        "kind": "search",
        "name": "small search",
        "base": base,
        "space": {"optim.lr": {"type": "log_uniform", "low": 1e-5, "high": 1e-2}},
        "budget": {"trials": 2},
        "concurrency": 1,
        **fields,
    }


def test_a_random_search_hands_over_the_best(client: Client) -> None:
    job = finished(client, client.jobs.create(searching()).id)
    trials = list(client.jobs.list(search=job.id))
    assert [t.state for t in trials] == ["SUCCEEDED", "SUCCEEDED"]
