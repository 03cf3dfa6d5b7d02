"""Small real jobs, and what tests ask of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from configs.wire import Manifest
from orchestrator.client import Client
from orchestrator.schemas import AttemptPublic, JobPublic

T = TypeVar("T")
DEADLINE_S = 240.0


def fashion_mnist_folder() -> Path:
    """Where the four idx files lie on this machine."""
    beside = Path(__file__).parents[3] / "shared" / "data" / "fashion-mnist"
    for folder in (beside, Path("/usr/share/datasets/fashion-mnist")):
        if (folder / "train-images-idx3-ubyte.gz").exists():
            return folder
    raise FileNotFoundError("Fashion-MNIST not found: apt-get install dataset-fashion-mnist")


def pretraining(**overrides: Any) -> dict[str, Any]:
    """A job of 60 steps on real images, a checkpoint every 20, with dropout: about 15 seconds with its start."""
    spec: dict[str, Any] = {
        "kind": "pretrain",
        "name": "small",
        "model": {
            "patch_size": 7,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "mlp_dim": 64,
            "image_size": 28,
            "in_channels": 1,
            "dropout": 0.1,
        },
        "data": {
            "source": {"type": "torchvision", "name": "FashionMNIST", "download": "never"},
            "augment": {"crop": "inception", "flip": True},
            "subset": {"fraction": 0.1, "seed": 1},
        },
        "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.05},
        "schedule": {"total_steps": 60, "warmup_steps": 10},
        "train": {"global_batch_size": 64, "precision": "fp32", "log_every_steps": 1},
        "zero": {"stage": 2},
        "resources": {"workers": 2, "gpus_per_worker": 0},
        "checkpoint": {"every_steps": 20, "keep_last": 10},
        "eval": {"batch_size": 500},
    }
    for dotted, value in overrides.items():
        part = spec
        *path, last = dotted.split("__")
        for key in path:
            part = part.setdefault(key, {})
        part[last] = value
    return spec


def until(what: str, probe: Callable[[], T | None], deadline_s: float = DEADLINE_S) -> T:
    """The first result of `probe` that is neither None nor False, asked again until the deadline."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        result = probe()
        if result is not None and result is not False:
            return result
        time.sleep(0.05)
    raise AssertionError(f"not within {deadline_s:.0f} s: {what}")


def finished(client: Client, job_id: str, deadline_s: float = DEADLINE_S) -> JobPublic:
    """The job once it has succeeded; its events are in the failure otherwise."""
    job = client.jobs.wait(job_id, deadline_s, poll_s=0.2)
    if job.state != "SUCCEEDED":
        events = "\n".join(f"{e.type}: {e.message}" for e in client.jobs.events(job_id))
        lines = "\n".join(f"{line.stream}: {line.msg}" for line in client.jobs.log_lines(job_id, tail=40))
        raise AssertionError(f"{job.state} {job.reason}: {job.message}\n{events}\n{lines}")
    return job


def running_attempt(client: Client, job_id: str, step: int, deadline_s: float = DEADLINE_S) -> AttemptPublic:
    """The job's attempt, once it trains and has done `step` steps."""

    def probe() -> AttemptPublic | None:
        job = client.jobs.get(job_id)
        assert not job.is_terminal, f"{job.state} {job.reason}: {job.message}"
        last = job.attempts[-1] if job.attempts else None
        return last if last and last.state != "ENDED" and last.to_step >= step else None

    return until(f"{job_id} at step {step}", probe, deadline_s)


def final_weights(client: Client, job_id: str) -> dict[str, np.ndarray]:
    """Every slice of the job's latest checkpoint, weights and optimizer, by file and key."""
    checkpoint = client.checkpoints.find(f"{job_id}/latest")
    manifest = client.checkpoints.manifest(checkpoint.id)
    return checkpoint_slices(client, manifest)


def checkpoint_slices(client: Client, manifest: Manifest) -> dict[str, np.ndarray]:
    from safetensors.numpy import load

    found: dict[str, np.ndarray] = {}
    for file in manifest.files:
        with client.checkpoints.read(manifest.checkpoint_id, file.name, {}) as response:
            assert response.status_code == 200, response.status_code
            data = response.read()
        assert len(data) == file.num_bytes
        found |= {f"{file.name}:{key}": value for key, value in load(data).items()}
    return found


def series(client: Client, job_id: str, name: str) -> Mapping[int, float | None]:
    """A metric by step."""
    found = client.jobs.metrics(job_id, [name], max_points=2000).series
    return dict(zip(found[0].steps, found[0].values, strict=True)) if found else {}
