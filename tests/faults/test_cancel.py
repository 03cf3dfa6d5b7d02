"""Cancelling at any moment (row 37) and at the very end (row 38): one end, and nothing starts again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from configs.failpoints import arm
from orchestrator.client import ApiError
from tests.faults.scene import EVERY, Scene, assert_nothing_left
from tests.stack.jobs import finished, running_attempt, until

pytestmark = pytest.mark.stack
LONG = 100_000


def cancelled(scene: Scene, job_id: str) -> float:
    """Cancel; the seconds it took until the job said so."""
    begun = time.monotonic()
    scene.client.jobs.cancel(job_id)
    job = scene.client.jobs.wait(job_id, 30, poll_s=0.1)
    assert (job.state, job.reason) == ("CANCELLED", "USER_CANCELLED"), f"{job.message}\n{scene.messages(job_id)}"
    return time.monotonic() - begun


def during_step(scene: Scene) -> str:
    job = scene.submit(schedule__total_steps=LONG)
    running_attempt(scene.client, job.id, step=3)
    return job.id


def while_preparing(scene: Scene) -> str:
    job = scene.submit(schedule__total_steps=LONG)
    until("preparing", lambda: scene.client.jobs.get(job.id).state == "PREPARING", 30)
    return job.id


def while_recovering(scene: Scene) -> str:
    fired = scene.arm("loop.step", "kill rank=1 step=5")
    job = scene.submit(schedule__total_steps=LONG)
    until("killed", fired.exists, 60)
    until("recovering", lambda: scene.client.jobs.get(job.id).state == "RECOVERING", 30)
    return job.id


@pytest.mark.parametrize("begin", [while_preparing, during_step, while_recovering])
def test_row_37_cancel(scene: Scene, begin: Callable[[Scene], str]) -> None:
    job_id = begin(scene)
    cancelled(scene, job_id)
    job = scene.client.jobs.get(job_id)
    attempts = job.num_attempts
    if begin is during_step:
        assert scene.client.checkpoints.find(f"{job_id}/latest").step == job.attempts[-1].to_step, "saved as it left"
    assert_nothing_left(scene, job)
    assert scene.client.jobs.get(job_id).num_attempts == attempts


def test_row_37_cancel_during_an_upload(scene: Scene) -> None:
    with scene.store.rule("hold", "PUT", rf"/checkpoints/step-{EVERY:09d}-.*/shards/.*\.safetensors", times=1) as rule:
        job = scene.submit(schedule__total_steps=LONG)
        assert rule.hit.wait(60)
        cancelled(scene, job.id)
    assert_nothing_left(scene, scene.client.jobs.get(job.id))


def test_row_38_cancel_races_the_end(scene: Scene) -> None:
    # Asked again and again from before the last step until the job has ended: one of the two wins, once.
    fired = arm(scene.failpoints, "loop.step", "sleep=0.5 rank=0 step=58")
    job = scene.submit()
    until("near the end", fired.exists, 60)
    answers: list[int] = []

    def ask() -> None:
        while not scene.client.jobs.get(job.id).is_terminal:
            try:
                scene.client.jobs.cancel(job.id)
                answers.append(200)
            except ApiError as error:
                answers.append(error.status)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    job = scene.client.jobs.get(job.id)
    ends = [e for e in scene.client.jobs.events(job.id) if e.type in ("job.succeeded", "job.cancelled", "job.failed")]
    assert len(ends) == 1, [e.type for e in ends]
    assert job.state in ("SUCCEEDED", "CANCELLED")
    assert set(answers) <= {200, 409}
    assert job.num_attempts == 1
    if job.state == "SUCCEEDED":
        finished(scene.client, job.id)
    assert_nothing_left(scene, job)
