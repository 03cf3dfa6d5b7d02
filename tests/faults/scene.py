"""What the fault tests stand on, and what every one of them asks at its end."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from configs.failpoints import arm
from orchestrator.client import Client
from orchestrator.embedded.stack import Stack
from orchestrator.schemas import AttemptPublic, CheckpointPublic, JobPublic
from tests.faults.proxy import FaultProxy
from tests.stack.jobs import final_weights, finished, pretraining, series, until

EVERY = 20
STEPS = 60


@dataclass(frozen=True)
class Golden:
    """An undisturbed run of `pretraining()`."""

    job_id: str
    weights: dict[str, np.ndarray]
    losses: Mapping[int, float | None]


@dataclass
class Scene:
    stack: Stack
    client: Client
    store: FaultProxy
    ray: FaultProxy
    failpoints: Path
    extensions: Path
    golden: Golden

    def submit(self, **overrides: Any) -> JobPublic:
        return self.client.jobs.create(pretraining(**overrides))

    def arm(self, name: str, action: str) -> Path:
        """Arm a failpoint; the path exists once it has fired."""
        return arm(self.failpoints, name, action)

    def disarm(self) -> None:
        for path in self.failpoints.iterdir():
            path.unlink(missing_ok=True)

    def pid_of_rank(self, job_id: str, rank: int) -> int:
        def probe() -> int | None:
            job = self.client.jobs.get(job_id)
            assert not job.is_terminal, f"{job.state} {job.reason}: {job.message}"
            last = job.attempts[-1] if job.attempts else None
            return next((r.pid for r in last.ranks if r.rank == rank), None) if last and last.state != "ENDED" else None

        return until(f"rank {rank} of {job_id}", probe)

    def kill_part(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to the server of a part of the stack (below its guardian); returns its process id."""
        (server,) = psutil.Process(self.stack.pid(name)).children()
        os.kill(server.pid, number)
        return server.pid

    def checkpoint_at(self, job_id: str, step: int) -> CheckpointPublic:
        """The job's checkpoint of this step, once it is registered."""

        def probe() -> CheckpointPublic | None:
            return next((c for c in self.client.jobs.checkpoints(job_id) if c.step == step), None)

        return until(f"checkpoint of step {step}", probe)

    def messages(self, job_id: str, kind: str = "") -> str:
        return "\n".join(f"{e.type}: {e.message}" for e in self.client.jobs.events(job_id) if e.type.startswith(kind))


def golden_run(client: Client) -> Golden:
    job = finished(client, client.jobs.create(pretraining(name="golden")).id)
    return Golden(job.id, final_weights(client, job.id), series(client, job.id, "train/loss"))


def assert_exact(scene: Scene, job: JobPublic) -> None:
    """Weights, moments and every loss are those of the undisturbed run, bit for bit, and the lineage is one."""
    weights = final_weights(scene.client, job.id)
    assert weights.keys() == scene.golden.weights.keys()
    assert all(np.array_equal(weights[key], scene.golden.weights[key]) for key in weights)
    assert series(scene.client, job.id, "train/loss") == scene.golden.losses
    assert_one_lineage(scene, job)


def assert_one_lineage(scene: Scene, job: JobPublic) -> None:
    """Attempts follow one another, each from a checkpoint that a former one committed, or from the start."""
    attempts = scene.client.jobs.get(job.id).attempts
    assert [a.number for a in attempts] == list(range(1, len(attempts) + 1))
    known = {c.id: c for c in scene.client.jobs.checkpoints(job.id)}
    for before, after in pairwise(attempts):
        assert before.ended_at is not None
        assert before.ended_at <= after.created_at
        if after.from_checkpoint is None:
            assert after.from_step == 0
        else:
            source = known[after.from_checkpoint]
            assert (source.step, source.attempt < after.number) == (after.from_step, True)
    steps = [c.step for c in known.values() if c.available]
    assert len(steps) == len(set(steps)), "two checkpoints of one step count"


def assert_nothing_left(scene: Scene, job: JobPublic) -> None:
    """No placement group, no live actor, no process of the job's attempts."""
    (ray,) = [watched.part for watched in scene.stack._watched if watched.part.name == "ray-head"]
    with httpx.Client(base_url=ray.address, headers=ray.headers, trust_env=False) as http:  # type: ignore[attr-defined]

        def left(kind: str, dead: str) -> list[str]:
            rows = http.get(f"/api/v0/{kind}", params={"limit": 1000}).json()["data"]["result"]["result"]
            return [str(row) for row in rows if row["state"] != dead]

        until("placement groups gone", lambda: not left("placement_groups", "REMOVED"), 20)
        until("actors gone", lambda: not left("actors", "DEAD"), 20)
    pids = {rank.pid for attempt in job.attempts for rank in attempt.ranks}
    until("processes gone", lambda: not [pid for pid in pids if is_running(pid)], 20)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def reasons(attempts: tuple[AttemptPublic, ...]) -> list[str | None]:
    return [attempt.exit_reason for attempt in attempts]


def direct(scene: Scene) -> tuple[Any, str]:
    """The store itself, beside the proxy."""
    (server,) = [watched.part for watched in scene.stack._watched if watched.part.name == "object-store"]
    return server.client(), server.bucket  # type: ignore[attr-defined]


def objects(scene: Scene, prefix: str) -> list[str]:
    s3, bucket = direct(scene)
    return [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])]
