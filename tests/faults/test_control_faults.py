"""Drivers, the API, the controller and Ray that die, lie or fall silent (rows 10 to 14, 16 to 18 of docs/faults.md)."""

from __future__ import annotations

import json
import os
import signal
import time

import psutil
import pytest

from configs.ids import checkpoint_id
from configs.layout import checkpoint_prefix, exit_key, manifest_key
from configs.wire import ExitFile
from orchestrator.schemas import AttemptPublic
from tests.faults.scene import (
    EVERY,
    Scene,
    assert_exact,
    assert_nothing_left,
    direct,
    is_running,
    objects,
    reasons,
)
from tests.stack.jobs import finished, running_attempt, until

pytestmark = pytest.mark.stack
DRIVER = "workers.driver"


def process_of(scene: Scene, needle: str) -> psutil.Process:
    """The process below the Ray head whose command line holds the needle."""

    def probe() -> psutil.Process | None:
        for process in psutil.Process(scene.stack.pid("ray-head")).children(recursive=True):
            try:
                # The driver by its own argument: the shell that started it says it too.
                words = process.cmdline()
                if needle in (words if needle == DRIVER else " ".join(words)):
                    return process
            except psutil.NoSuchProcess:
                continue
        return None

    return until(f"a process of {needle}", probe)


def freeze(scene: Scene, job_id: str, step: int) -> None:
    """Arm and wait: rank 1 stands at `step`, past a checkpoint, until somebody ends it."""
    fired = scene.arm("loop.step", f"sleep=20 rank=1 step={step}")
    until(f"{job_id} at step {step}", fired.exists)


@pytest.mark.parametrize("needle", [DRIVER, "JobSupervisor"])
def test_rows_10_11_the_driver_or_its_supervisor_is_killed(scene: Scene, needle: str) -> None:
    job = scene.submit()
    freeze(scene, job.id, EVERY + 5)
    scene.checkpoint_at(job.id, EVERY)
    driver = process_of(scene, DRIVER)
    process_of(scene, needle).kill()
    until("the driver is gone", lambda: not is_running(driver.pid), 20)
    job = finished(scene.client, job.id)
    first, second = job.attempts
    assert first.exit_reason in ("DRIVER_LOST", "WORKER_LOST")
    assert second.from_step == EVERY
    assert_exact(scene, job)
    assert_nothing_left(scene, job)


def test_row_13_ray_says_failed_while_the_workers_live(scene: Scene) -> None:
    def failed(body: bytes) -> bytes:
        details = json.loads(body)
        return json.dumps(details | {"status": "FAILED", "message": "lost"}).encode() if "status" in details else body

    def nothing(body: bytes) -> bytes:
        listing = json.loads(body)
        listing["data"]["result"]["result"] = []
        return json.dumps(listing).encode()

    # The zombie stands past its first checkpoint, and its driver hears nothing, until its successor is there.
    stands = scene.arm("loop.step", f"stop rank=1 step={EVERY + 5}")
    job = scene.submit()
    until("the zombie stands", stands.exists)
    scene.checkpoint_at(job.id, EVERY)
    attempt = scene.client.jobs.get(job.id).attempts[-1]
    rank, driver = scene.pid_of_rank(job.id, 1), process_of(scene, DRIVER).pid
    os.kill(driver, signal.SIGSTOP)
    # Ray calls the job failed and lists none of its actors or placement groups, though all of them run.
    with (
        scene.ray.rule("change", "GET", rf"/api/jobs/{attempt.id}$", change=failed),
        scene.ray.rule("change", "GET", r"/api/v0/(actors|placement_groups)", change=nothing),
    ):
        until("a second attempt", lambda: scene.client.jobs.get(job.id).num_attempts == 2)
    # It trains on beside its successor, and commits.
    beyond = scene.arm("loop.step", f"sleep=25 rank=1 step={2 * EVERY + 5}")
    os.kill(rank, signal.SIGCONT)
    zombies = manifest_key(checkpoint_prefix(job.id, 2 * EVERY, attempt.number))
    until("the zombie commits", lambda: objects(scene, zombies))
    until("it is past that", beyond.exists)
    assert not scene.client.jobs.get(job.id).is_terminal
    # Its driver asks again, is told, and ends it.
    os.kill(driver, signal.SIGCONT)
    until("the zombie has left", lambda: not [p for p in (driver, *pids(attempt)) if is_running(p)], 40)
    assert exit_of(scene, attempt.id).reason == "FENCED"
    job = finished(scene.client, job.id)
    first, second = job.attempts
    assert reasons(job.attempts) == ["DRIVER_LOST", "COMPLETED"]
    assert first.to_step <= EVERY + 5, "what it did afterwards is not accounted for"
    assert second.from_step == EVERY
    assert checkpoint_id(job.id, 2 * EVERY, 1) in scene.messages(job.id, "checkpoint.ignored"), scene.messages(job.id)
    counted = [c for c in scene.client.jobs.checkpoints(job.id) if c.available]
    assert [(c.step, c.attempt) for c in sorted(counted, key=lambda c: c.step)] == [(20, 1), (40, 2), (60, 2)]
    assert_exact(scene, job)
    assert_nothing_left(scene, job)


def pids(attempt: AttemptPublic) -> list[int]:
    return [rank.pid for rank in attempt.ranks]


def exit_of(scene: Scene, attempt: str) -> ExitFile:
    """What the attempt's driver said last."""
    s3, bucket = direct(scene)
    return ExitFile.model_validate_json(s3.get_object(Bucket=bucket, Key=exit_key(attempt))["Body"].read())


@pytest.mark.parametrize("down_s", [0.0, 60.0])
def test_row_16_the_control_plane_is_killed(scene: Scene, down_s: float) -> None:
    # Slow enough to train on all the while.
    scene.arm("loop.step", "sleep=1.4 rank=1 always")
    job = scene.submit()
    running_attempt(scene.client, job.id, step=3)
    alone = {"workers": 1, "cpus_per_worker": 7, "gpus_per_worker": 0}
    short = {"schedule": {"total_steps": 2}, "eval": {"at_end": False}, "resources": alone}
    waiting = [scene.submit(name=f"waiting-{number}", **short).id for number in range(2)]
    # Moved to the front, so that the order is not that of submission alone.
    waiting.insert(0, scene.submit(name="urgent", queue={"priority": 90}, **short).id)
    before = until("all have a place", lambda: places(scene, waiting), 20)
    assert before == [1, 2, 3]
    parts = ("API", "controller")
    if down_s:
        # Stopped, then killed: away for a while, without a word.
        servers = [scene.kill_part(part, signal.SIGSTOP) for part in parts]
        time.sleep(down_s)  # the fault itself: so long nobody hears of them
        for server in servers:
            os.kill(server, signal.SIGKILL)
    else:
        for part in parts:
            scene.kill_part(part)
    until("the API answers", lambda: answers(scene), 60)
    assert places(scene, waiting) == before, "the queue is as it was"
    running_attempt(scene.client, job.id, step=3 + int(down_s / 3))
    scene.disarm()
    job = finished(scene.client, job.id)
    assert reasons(job.attempts) == ["COMPLETED"], "the attempt has gone on, and nobody started another"
    assert_exact(scene, job)
    # Each has run once, in their order.
    done = [finished(scene.client, other) for other in waiting]
    assert [reasons(other.attempts) for other in done] == [["COMPLETED"]] * 3
    started = [other.attempts[0].created_at for other in done]
    assert started == sorted(started)
    assert_nothing_left(scene, job)


def places(scene: Scene, jobs: list[str]) -> list[int] | None:
    """Each job's position in the queue; None while one has none."""
    found = [scene.client.jobs.get(job).queue for job in jobs]
    return [place.position for place in found if place is not None] if None not in found else None


def answers(scene: Scene) -> bool:
    try:
        return scene.client.health().status == "ok"
    except Exception:  # noqa: BLE001 - it is down in many ways
        return False


@pytest.mark.parametrize("place", ["launch.before_submit", "launch.after_submit"])
def test_rows_17_18_the_controller_is_killed_around_the_submission(scene: Scene, place: str) -> None:
    fired = scene.arm(place, "kill")
    job = finished(scene.client, scene.submit().id)
    assert fired.exists()
    assert reasons(job.attempts) == ["COMPLETED"], "submitted once, whatever was lost"
    assert_exact(scene, job)
    assert_nothing_left(scene, job)


def test_row_17_the_reply_to_the_submission_is_lost(scene: Scene) -> None:
    with scene.ray.rule("lose", "POST", r"/api/jobs/", times=1) as rule:
        job = finished(scene.client, scene.submit().id)
        assert rule.hits == 1
    assert reasons(job.attempts) == ["COMPLETED"]
    assert_exact(scene, job)


def test_row_14_the_workers_cannot_reach_the_control_plane(scene: Scene) -> None:
    job = scene.submit()
    running_attempt(scene.client, job.id, step=1)
    server = scene.kill_part("API", signal.SIGSTOP)
    # The attempt ends meanwhile: its last manifest lies in the store though nobody could be told.
    manifest = f"jobs/{job.id}/checkpoints/step-{60:09d}-a0001/manifest.json"
    (store,) = [watched.part for watched in scene.stack._watched if watched.part.name == "object-store"]
    s3 = store.client()  # type: ignore[attr-defined]
    try:
        until("the last commit", lambda: s3.list_objects_v2(Bucket=store.bucket, Prefix=manifest)["KeyCount"], 60)  # type: ignore[attr-defined]
    finally:
        os.kill(server, signal.SIGCONT)
    job = finished(scene.client, job.id)
    assert reasons(job.attempts) == ["COMPLETED"]
    assert_exact(scene, job)
    assert_nothing_left(scene, job)


def test_row_12_the_head_is_killed_and_comes_back_as_another_cluster(scene: Scene) -> None:
    first = scene.submit()
    freeze(scene, first.id, EVERY + 5)
    scene.checkpoint_at(first.id, EVERY)
    second = scene.submit(name="second")  # in whatever state the end of the cluster finds it
    process_of(scene, "gcs_server").kill()
    first = finished(scene.client, first.id, 240)
    assert first.attempts[0].exit_reason in ("CLUSTER_LOST", "DRIVER_LOST", "WORKER_LOST", "NODE_LOST")
    assert reasons(first.attempts)[1:] == ["COMPLETED"], "started again once"
    # Its ranks outlive the head, on a busy machine for longer than they are held: what they committed counts.
    committed = [e for e in scene.client.jobs.events(first.id) if e.type == "checkpoint.committed" and e.attempt == 1]
    assert first.attempts[1].from_checkpoint == committed[-1].data["checkpoint_id"]
    assert first.attempts[1].from_step >= EVERY
    assert_exact(scene, first)
    second = finished(scene.client, second.id, 240)
    assert reasons(second.attempts)[-1] == "COMPLETED"
    assert len(second.attempts) <= 2
    assert_exact(scene, second)
    assert_nothing_left(scene, first)
    assert_nothing_left(scene, second)
