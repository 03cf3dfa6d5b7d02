"""The jobs of `make gpu-check`, gone through on the CPU."""

from __future__ import annotations

import pytest

from orchestrator.client import Client
from tests.gpu.jobs import run_jobs

pytestmark = pytest.mark.timeout(600)


def test_its_jobs_go_through_on_the_cpu(client: Client) -> None:
    seconds: dict[str, float] = {}
    found = run_jobs(client, 1, "cpu", seconds)
    assert found["passed"], found
    assert found["attempts"] == 2
    assert found["evaluate_top1"] > 0.5
    assert found["fetched_parameters"] > 100_000
    assert found["large"]["images_per_s"] > 0
    assert list(seconds) == ["pretrain, killed once", "finetune", "evaluate, inspect, export", "large"]
