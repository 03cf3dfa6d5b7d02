"""Whole attempts on a real Ray head and a real object store, started through Ray's job API as the launcher does."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
import pytest

from configs.ids import attempt_id, checkpoint_id, new_job_id
from configs.layout import checkpoint_prefix, manifest_key
from configs.reasons import ExitReason
from configs.states import Desired
from configs.wire import AttemptFile, Manifest
from tests.fakes.control_plane import SECRET, FakeAttempt
from tests.workers.attempts import make_attempt, tiny_spec
from tests.workers.cluster import LEAKY, STANDIN, Cluster, wait_for

pytestmark = pytest.mark.stack
START_S = 150.0
"""From submission to the first step, on a machine that has other things to do."""
DRIVER = "python -m workers.driver"


def standin(cluster: Cluster, cpus_per_worker: int = 1, **plan: Any) -> tuple[AttemptFile, FakeAttempt]:
    """A submitted attempt of the stand-in: `steps` of `step_s` seconds on two ranks."""
    resources = {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": cpus_per_worker}
    attempt = cluster.write_attempt(
        {"kind": "pretrain", "standin": plan, "resources": resources, "schedule": {"total_steps": plan["steps"]}}, 2
    )
    cluster.submit(attempt.attempt_id, STANDIN)
    return attempt, cluster.control_plane.attempt(attempt.attempt_id)


def training(cluster: Cluster, **parts: Any) -> tuple[AttemptFile, FakeAttempt]:
    """A submitted attempt of the real thing."""
    attempt = make_attempt(tiny_spec(**parts), world_size=2, job_id=new_job_id())
    cluster.put_attempt(attempt)
    cluster.submit(attempt.attempt_id, DRIVER)
    return attempt, cluster.control_plane.attempt(attempt.attempt_id)


def wait_gone(cluster: Cluster, attempt: AttemptFile) -> None:
    """The driver has ended well and nothing of its Ray job is left."""
    wait_for(lambda: cluster.job(attempt.attempt_id)["status"] == "SUCCEEDED", 20.0, "end of the driver")
    wait_for(lambda: not cluster.live(attempt.attempt_id), 20.0, f"end of {cluster.live(attempt.attempt_id)}")


def stepping(seen: FakeAttempt) -> dict[int, int]:
    """Processes by rank, once both ranks have done some steps."""
    return wait_for(lambda: seen.pids() if seen.last_step >= 3 and len(seen.pids()) == 2 else None, START_S, "step 3")


def says(cluster: Cluster, attempt: AttemptFile, text: str, stream: str = "driver") -> bool:
    """Whether the shipped output contains the text."""
    return any(text in line.msg for line in cluster.lines(attempt, stream))


def test_an_attempt_trains_to_its_end(cluster: Cluster) -> None:
    attempt, seen = training(cluster, zero={"stage": 1}, schedule={"total_steps": 6}, resources={"workers": 2})
    written = cluster.wait_exit(attempt, START_S)
    assert written.reason is ExitReason.COMPLETED, written
    assert (written.last_step, written.checkpoint_step, written.first_failure) == (6, 6, None)
    assert sorted(seen.values("train/loss")) == [1, 2, 3, 4, 5, 6]
    assert seen.checkpoints == [checkpoint_id(attempt.job_id, 6, 1)]
    assert seen.is_finished
    assert {batch.total_steps for batch in seen.batches.values()} == {6}
    manifest = Manifest.model_validate_json(cluster.store.get(manifest_key(checkpoint_prefix(attempt.job_id, 6, 1))))
    assert (manifest.world_size, manifest.zero_stage) == (2, 1)

    texts = {
        stream: [line.msg for line in cluster.lines(attempt, stream)]
        for stream in ("driver", "rank-00000", "rank-00001")
    }
    assert any("The attempt ends." in text for text in texts["driver"])
    for rank in range(2):
        assert any(text.startswith(f"Rank started. rank={rank} world_size=2") for text in texts[f"rank-0000{rank}"])
    wait_gone(cluster, attempt)
    secrets = (SECRET, cluster.store_server.secret_key, cluster.ray.token)
    actors = cluster.request("GET", "/api/v0/actors?detail=true&limit=1000").json()
    shown = str([cluster.job(attempt.attempt_id), actors, texts])
    assert not any(secret in shown for secret in secrets)


def test_a_cancelled_attempt_leaves_with_a_checkpoint(cluster: Cluster) -> None:
    attempt, seen = training(cluster, schedule={"total_steps": 100_000}, resources={"workers": 2})
    stepping(seen)
    seen.desired = Desired.STOP
    written = cluster.wait_exit(attempt, 30.0)
    assert (written.reason, written.first_failure) == (ExitReason.USER_CANCELLED, None), written
    assert written.checkpoint_step == written.last_step > 3
    cluster.store.get(manifest_key(checkpoint_prefix(attempt.job_id, written.last_step, 1)))
    wait_gone(cluster, attempt)


def test_a_killed_worker_is_named_within_seconds(cluster: Cluster) -> None:
    attempt, seen = standin(cluster, steps=100_000, step_s=0.05)
    pids = stepping(seen)
    os.kill(pids[1], signal.SIGKILL)
    written = cluster.wait_exit(attempt, 15.0)
    assert written.reason is ExitReason.WORKER_LOST, written
    assert written.first_failure is not None
    assert written.first_failure.rank == 1
    assert written.first_failure.last_lines[-1] == "torch threads 1 of rank 1", "escape sequences are taken out"
    assert written.last_step >= 3
    wait_gone(cluster, attempt)


def test_training_goes_on_without_the_control_plane(cluster: Cluster) -> None:
    """And a rank that then fails by itself is named, not its peer that waits for it."""
    attempt, seen = standin(cluster, steps=400, step_s=0.02, fail_at=300, fail_rank=1)
    stepping(seen)
    cluster.control_plane.go_away()
    before = seen.last_step
    wait_for(lambda: says(cluster, attempt, "reports wait on disk"), 30.0, "the absence noticed")
    cluster.control_plane.come_back()
    written = cluster.wait_exit(attempt, 60.0)
    assert (written.reason, written.message) == (ExitReason.DATA_ERROR, "Rank 1: image 7 of train is missing")
    assert written.last_step == 300 > before
    assert sorted(seen.values("train/loss")) == list(range(1, 301)), "nothing of the absence is lost"
    assert seen.order == sorted(set(seen.order))
    wait_gone(cluster, attempt)


def test_a_frozen_worker_is_named_and_ended(cluster: Cluster) -> None:
    attempt, seen = standin(cluster, steps=100_000, step_s=0.05)
    pids = stepping(seen)
    frozen = psutil.Process(pids[0])
    frozen.suspend()
    written = cluster.wait_exit(attempt, 30.0)
    assert written.reason is ExitReason.WORKER_HUNG, written
    assert written.first_failure is not None
    assert written.first_failure.rank == 0
    wait_gone(cluster, attempt)
    wait_for(
        lambda: not frozen.is_running() or frozen.status() == psutil.STATUS_ZOMBIE, 10.0, "end of the frozen process"
    )


def test_ray_told_to_stop_the_job(cluster: Cluster) -> None:
    attempt, seen = standin(cluster, steps=100_000, step_s=0.05)
    stepping(seen)
    cluster.stop_job(attempt.attempt_id)
    written = cluster.wait_exit(attempt, 15.0)
    assert (written.reason, written.checkpoint_step) == (ExitReason.PREEMPTED, written.last_step)
    wait_for(lambda: not cluster.live(attempt.attempt_id), 20.0, "end of everything")


def test_a_killed_driver_takes_its_ranks_along(cluster: Cluster) -> None:
    attempt, seen = standin(cluster, steps=100_000, step_s=0.05)
    pids = stepping(seen)
    os.kill(seen.claims[0].pid, signal.SIGKILL)
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids.values()), 15.0, "end of the ranks")
    wait_for(lambda: not cluster.live(attempt.attempt_id), 20.0, "end of everything")
    assert cluster.exit_file(attempt) is None


def test_the_reaper_removes_what_outlives_its_driver(cluster: Cluster) -> None:
    job_id = new_job_id()
    leaky = attempt_id(job_id, 1)
    cluster.submit(leaky, LEAKY)
    wait_for(lambda: cluster.job(leaky)["status"] in ("SUCCEEDED", "FAILED"), START_S, "end of the leaking driver")
    assert cluster.job(leaky)["status"] == "SUCCEEDED", cluster.job(leaky)["message"]
    left = cluster.live(leaky)
    assert sorted(text.split()[0] for text in left) == ["actors", "placement_groups"]
    variables = {"PATCHWORK_ATTEMPT_ID": leaky, "PATCHWORK_RAY_JOB_ID": cluster.job(leaky)["job_id"]}
    cluster.submit(f"reap_{leaky}_000", "python -m workers.reap", **variables)
    wait_for(lambda: not cluster.live(leaky), START_S, "end of everything")
    wait_for(lambda: cluster.job(f"reap_{leaky}_000")["status"] == "SUCCEEDED", 20.0, "end of the reaper")


def test_a_lost_node_is_named_and_its_output_is_kept(cluster: Cluster) -> None:
    """Two ranks of three cores on two nodes of four: the second node's courier ships, then the node is gone."""
    node = cluster.add_node(num_cpus=4)
    try:
        attempt, seen = standin(cluster, cpus_per_worker=3, steps=100_000, step_s=0.05)
        pids = stepping(seen)
        below = {process.pid for process in psutil.Process(node.pid).children(recursive=True)}
        [lost] = [rank for rank, pid in pids.items() if pid in below]
        words = f"torch threads 3 of rank {lost}"
        wait_for(lambda: says(cluster, attempt, words, f"rank-{lost:05d}"), 30.0, "the courier of the second node")
    finally:
        node.stop(0)
    written = cluster.wait_exit(attempt, 60.0)
    assert written.reason is ExitReason.NODE_LOST, written
    assert written.first_failure is not None
    assert written.first_failure.rank == lost
    # Until Ray has noticed, it would place the next job there.
    wait_for(lambda: len(cluster.alive_nodes()) == 1, 60.0, "Ray to notice")
