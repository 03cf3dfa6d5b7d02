"""Tiny jobs on generated images, and their attempt files, as the control plane would write them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from configs.datasets import card_for
from configs.ids import checkpoint_id
from configs.layout import checkpoint_prefix
from configs.load import parse_spec
from configs.resolve import SourceCheckpoint, canonical_json, resolve, spec_hash, training_fingerprint
from configs.spec import EvaluateJob, ExportJob, JobSpec
from configs.wire import AttemptFile, CheckpointSource, DatasetCard, ParentCut

JOB = "job_01JZZZZZZZZZZZZZZZZZZZZZZZ"
OTHER_JOB = "job_01JYYYYYYYYYYYYYYYYYYYYYYY"
TINY: dict[str, Any] = {
    "kind": "pretrain",
    "model": {
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "mlp_dim": 40,
        "image_size": 8,
        "dropout": 0.1,
        "drop_path": 0.1,
    },
    "data": {"source": {"type": "synthetic", "num_train": 70, "num_eval": 21, "num_classes": 6, "image_size": 8}},
    "optim": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "schedule": {"total_steps": 6, "warmup_steps": 1},
    "train": {"global_batch_size": 16, "micro_batch_size": 4, "precision": "fp32", "seed": 3, "log_every_steps": 1},
    "zero": {"stage": 0},
    "eval": {"at_end": False},
    "resources": {"workers": 1, "gpus_per_worker": 0},
}


def tiny_spec(**parts: Any) -> JobSpec:
    """TINY with `parts` laid over it, resolved: tiny_spec(zero={"stage": 3}, optim={"name": "sgd"})."""
    raw = {k: dict(v) if isinstance(v, dict) else v for k, v in TINY.items()}
    for part, value in parts.items():
        raw[part] = raw.get(part, {}) | value if isinstance(value, dict) else value
    source = raw.pop("_source", None)
    spec = parse_spec(raw)
    return resolve(spec, card_of(spec), source)


def card_of(spec: JobSpec) -> DatasetCard | None:
    data = None if isinstance(spec, ExportJob) else spec.data
    return None if data is None else card_for(data.source, {})


def make_attempt(
    spec: JobSpec,
    world_size: int,
    number: int = 1,
    job_id: str = JOB,
    resume_from: CheckpointSource | None = None,
    init_from: CheckpointSource | None = None,
    parents: tuple[ParentCut, ...] = (),
    card: DatasetCard | None = None,
) -> AttemptFile:
    """`card`: of the data, where it is a folder."""
    stored = canonical_json(spec)
    card = card or card_of(spec)
    return AttemptFile(
        job_id=job_id,
        attempt_id=f"att_{job_id.removeprefix('job_')}_{number:04d}",
        number=number,
        spec=json.loads(stored),
        spec_hash=spec_hash(stored),
        training_fingerprint=training_fingerprint(spec, card.fingerprint if card else ""),
        world_size=world_size,
        dataset=card,
        parents=parents,
        resume_from=resume_from,
        init_from=init_from,
        created_at=datetime.now(UTC),
    )


def saved_at(step: int, attempt: int = 1, job_id: str = JOB) -> CheckpointSource:
    """The checkpoint that attempt `attempt` took at `step`."""
    return CheckpointSource(
        checkpoint_id=checkpoint_id(job_id, step, attempt), prefix=checkpoint_prefix(job_id, step, attempt)
    )


__all__ = ["JOB", "OTHER_JOB", "EvaluateJob", "SourceCheckpoint", "card_of", "make_attempt", "saved_at", "tiny_spec"]
