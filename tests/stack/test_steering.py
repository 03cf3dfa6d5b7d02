"""Cancelling, retrying, failing: what users do and see, on real parts; and that nothing stays behind."""

from __future__ import annotations

import httpx
import pytest

from orchestrator.client import ApiError, Client
from orchestrator.embedded.stack import Stack
from tests.stack.jobs import finished, pretraining, running_attempt, until

pytestmark = pytest.mark.stack


def test_cancel_saves_and_retry_continues(client: Client, stack: Stack) -> None:
    job = client.jobs.create(pretraining(schedule__total_steps=100_000))
    running_attempt(client, job.id, step=5)
    client.jobs.cancel(job.id)
    job = client.jobs.wait(job.id, 60, poll_s=0.1)
    assert (job.state, job.reason) == ("CANCELLED", "USER_CANCELLED")
    saved = client.checkpoints.find(f"{job.id}/latest")
    assert saved.step == job.attempts[-1].to_step

    again = client.jobs.retry(job.id)
    assert again.retry_of == job.id
    attempt = running_attempt(client, again.id, step=saved.step + 1)
    assert (attempt.from_checkpoint, attempt.from_step) == (saved.id, saved.step)
    client.jobs.cancel(again.id)
    assert client.jobs.wait(again.id, 60, poll_s=0.1).state == "CANCELLED"
    assert_nothing_left(stack)


def test_a_job_too_large_says_so_and_a_cancel_in_the_queue_is_at_once(client: Client) -> None:
    job = client.jobs.create(pretraining(resources={"workers": 64, "gpus_per_worker": 0}))

    def told() -> bool:
        queue = client.jobs.get(job.id).queue
        return queue is not None and queue.reason == "EXCEEDS_CLUSTER"

    until("the reason of waiting", told, 20)
    client.jobs.cancel(job.id)
    assert client.jobs.wait(job.id, 20, poll_s=0.1).state == "CANCELLED"


def test_a_job_that_cannot_work_fails_once_with_the_cause(client: Client) -> None:
    spec = pretraining(data={"source": {"type": "torchvision", "name": "CIFAR10", "download": "never"}})
    spec["model"]["in_channels"] = 3
    job = client.jobs.wait(client.jobs.create(spec).id, 90, poll_s=0.2)
    assert (job.state, job.reason, job.num_attempts) == ("FAILED", "DATA_ERROR", 1)
    assert "CIFAR10" in job.message
    assert job.advice


def test_logs_events_and_metrics_outlive_the_workers(client: Client) -> None:
    job = finished(client, client.jobs.create(pretraining()).id)
    streams = {line.stream for line in client.jobs.log_lines(job.id)}
    assert {"driver", "rank-00000", "rank-00001"} <= streams
    types = [event.type for event in client.jobs.events(job.id)]
    assert types[0] == "job.queued"
    names = client.jobs.metrics(job.id).names
    assert {"train/loss", "train/lr", "train/grad_norm", "perf/images_per_s", "perf/mfu", "perf/data_wait"} <= set(
        names
    )
    assert {"perf/step_time_s/rank-00000", "perf/step_time_s/rank-00001"} <= set(names)
    followed = list(client.jobs.follow_events(job.id))
    assert [event.type for event in followed] == types


def test_a_wrong_token_is_refused(stack: Stack) -> None:
    with Client(stack.url, "pw_wrong") as client, pytest.raises(ApiError) as refused:
        client.jobs.page()
    assert refused.value.status == 401


def assert_nothing_left(stack: Stack) -> None:
    """No placement group and no live actor of a job remains on the Ray cluster."""
    (ray,) = [watched.part for watched in stack._watched if watched.part.name == "ray-head"]
    with httpx.Client(base_url=ray.address, headers=ray.headers, trust_env=False) as http:  # type: ignore[attr-defined]

        def left(kind: str, dead: str) -> list[str]:
            rows = http.get(f"/api/v0/{kind}", params={"limit": 1000}).json()["data"]["result"]["result"]
            return [str(row) for row in rows if row["state"] != dead]

        until("placement groups gone", lambda: not left("placement_groups", "REMOVED"), 20)
        until("actors gone", lambda: not left("actors", "DEAD"), 20)
