"""A loss spike on real parts: two batches with wrong labels, seen, undone and passed over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.client import Client
from tests.stack.jobs import finished
from workers.data.order import batch_indices

pytestmark = pytest.mark.stack
SEED, BATCH, STEPS, POISONED = 4, 32, 90, 50
NUM_IMAGES = 3840


def make_images(folder: Path) -> None:
    """Bright and dark images; those of batches POISONED and the next lie in the other's folder."""
    wrong = set(batch_indices(SEED, NUM_IMAGES, POISONED * BATCH, 2 * BATCH).tolist())
    generator = np.random.default_rng(0)
    for split, count, misplaced in (("train", NUM_IMAGES, wrong), ("test", 64, set())):
        for index in range(count):
            is_bright = index < count // 2
            path = folder / split / ("bright" if is_bright else "dark") / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            level = 190 if is_bright != (index in misplaced) else 60
            Image.fromarray(generator.integers(level - 40, level + 40, (8, 8), dtype=np.uint8)).save(path)


def test_a_spike_is_undone_and_its_data_passed_over(client: Client, data_root: Path) -> None:
    make_images(data_root / "spiky")
    client.add_dataset("spiky", path="spiky")
    job = client.jobs.create(
        {
            "kind": "pretrain",
            "name": "spiky",
            "model": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32, "image_size": 8}
            | {"in_channels": 1},
            "data": {
                "source": {"type": "folder", "name": "spiky"},
                "augment": {"crop": "resize", "flip": False},
            },
            "optim": {"name": "adamw", "lr": 3e-3},
            "schedule": {"total_steps": STEPS, "warmup_steps": 5, "decay": "constant"},
            "train": {"global_batch_size": BATCH, "precision": "fp32", "seed": SEED, "log_every_steps": 1}
            | {"spike_rollback": {"factor": 4.0, "window": 10, "patience": 2}},
            "zero": {"stage": 1},
            "resources": {"workers": 2, "gpus_per_worker": 0},
            "checkpoint": {"every_steps": 10, "keep_last": 10},
        }
    )
    done = finished(client, job.id)
    first, second = done.attempts
    assert (first.exit_reason, second.exit_reason) == ("LOSS_SPIKE", "COMPLETED")
    assert (first.to_step, second.from_step) == (POISONED + 2, POISONED - 10), "the checkpoint at 50 saw no calm loss"
    assert done.usage.wasted_steps == 12
    events = {event.type: event for event in client.jobs.events(job.id)}
    assert events["loss.spike"].data == {"step": POISONED + 2, "sound_step": POISONED - 1, "calm_step": POISONED}
    assert events["data.skipped"].message == "12 global batches are passed over"
    losses = next(s for s in client.jobs.metrics(job.id, ["train/loss"], max_points=1000).series)
    late = [value for step, value in zip(losses.steps, losses.values, strict=True) if step > POISONED - 10]
    assert max(late) < 0.2, "the poisoned batches were never trained on again"
    assert done.last_metrics["eval/top1"] == 1.0
