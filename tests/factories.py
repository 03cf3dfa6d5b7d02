"""Jobs, attempts, manifests and exit files with sensible values; tests say what differs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from configs.ids import attempt_id, checkpoint_id, new_job_id, parse_attempt_id
from configs.layout import checkpoint_prefix, exit_key, manifest_key
from configs.model import VitConfig
from configs.reasons import ExitReason
from configs.states import AttemptState, Desired, JobState
from configs.wire import ExitFile, Manifest, Preprocess, RankFailure, ShardFile, TensorSlice
from orchestrator.control.transitions import enqueue
from orchestrator.storage.db import Database
from orchestrator.storage.store import ObjectStore
from orchestrator.storage.tables import AttemptRow, JobRow

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
FINGERPRINT = "sha256:fingerprint"
MODEL = VitConfig(
    patch_size=7, embed_dim=16, depth=1, num_heads=2, mlp_dim=32, image_size=(14, 14), in_channels=1, num_classes=10
)
PREPROCESS = Preprocess(image_size=(14, 14), in_channels=1, mean=(0.5,), std=(0.5,))


def make_spec(**sections: Any) -> dict[str, Any]:
    """The parts of a resolved pretrain spec that the control plane reads."""
    return {
        "kind": "pretrain",
        "resources": {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 1},
        "train": {"global_batch_size": 8},
        "checkpoint": {"keep_last": 2, "keep_best": 1, "metric": "eval/top1"},
        "retry": {"max_user_failures": 0, "max_infra_failures": 3},
        "queue": {},
        **sections,
    }


def make_job(spec: dict[str, Any] | None = None, **fields: Any) -> JobRow:
    """A queued job's row, not in any session."""
    spec = spec or make_spec()
    values: dict[str, Any] = {
        "id": new_job_id(),
        "kind": spec["kind"],
        "name": "a job",
        "project": "default",
        "labels": {},
        "submitted": spec,
        "spec_json": json.dumps(spec).encode(),
        "spec_hash": "sha256:spec",
        "training_fingerprint": FINGERPRINT,
        "plan": {},
        "priority": 50,
        "total_steps": 100,
        "desired": Desired.RUN,
        "state": JobState.QUEUED,
        "message": "",
        "state_since": NOW,
        "version": 1,
        "created_at": NOW,
        "step": 0,
        "num_attempts": 0,
        "user_failures": 0,
        "infra_failures": 0,
        "gpu_seconds": 0.0,
        "wasted_gpu_s": 0.0,
        "wasted_steps": 0,
        "overhead_s": 0.0,
        "last_metrics": {},
    }
    return JobRow(**(values | fields))


def make_attempt(job: JobRow, number: int = 1, **fields: Any) -> AttemptRow:
    """The row of an attempt that has been submitted and has not reported, not in any session."""
    values: dict[str, Any] = {
        "id": attempt_id(job.id, number),
        "job_id": job.id,
        "number": number,
        "state": AttemptState.STARTING,
        "world_size": 2,
        "cluster_id": "session_1",
        "nodes": [],
        "from_step": 0,
        "to_step": 0,
        "phase": "starting",
        "ranks": {},
        "report_seq": 0,
        "submitted_at": NOW,
        "created_at": NOW,
        "wasted_steps": 0,
    }
    return AttemptRow(**(values | fields))


def add_job(db: Database, spec: dict[str, Any] | None = None, **fields: Any) -> JobRow:
    """A job in the queue; returns its row, detached."""
    job = make_job(spec, **fields)
    with db.session() as session:
        enqueue(session, job, actor="ann", at=job.created_at)
    return job


def make_manifest(job: JobRow, attempt: int, step: int, **fields: Any) -> Manifest:
    """A checkpoint of one weight in one shard of four bytes."""
    shard = ShardFile(
        name="shards/weights-00000-of-00001.safetensors",
        rank=0,
        role="weights",
        num_bytes=4,
        crc32c=(0,),
        slices=(TensorSlice(key="0", name="head.bias", kind="weight", start=0, numel=1),),
    )
    values: dict[str, Any] = {
        "checkpoint_id": checkpoint_id(job.id, step, attempt),
        "job_id": job.id,
        "attempt": attempt,
        "step": step,
        "position": step * 8,
        "total_steps": 100,
        "world_size": 2,
        "zero_stage": 1,
        "optimizer": "adamw",
        "optimizer_step": step,
        "spec_hash": job.spec_hash,
        "training_fingerprint": job.training_fingerprint,
        "data_fingerprint": "sha256:data",
        "versions": {},
        "metrics": {},
        "model": MODEL,
        "preprocess": PREPROCESS,
        "tensors": {"head.bias": (1,)},
        "files": (shard,),
        "nonce": "nonce",
        "created_at": NOW,
    }
    return Manifest(**(values | fields))


def put_checkpoint(store: ObjectStore, job: JobRow, attempt: int, step: int, **fields: Any) -> str:
    """What workers leave in the store for a checkpoint. Returns its id."""
    manifest = make_manifest(job, attempt, step, **fields)
    prefix = checkpoint_prefix(job.id, step, attempt)
    for file in manifest.files:
        store.put(prefix + file.name, b"\0" * file.num_bytes)
    store.put(manifest_key(prefix), manifest.model_dump_json().encode(), if_none_match=True)
    return manifest.checkpoint_id


def make_exit(attempt: str, reason: ExitReason, *, error_type: str = "", **fields: Any) -> ExitFile:
    failure = RankFailure(rank=0, error_type=error_type, message="boom") if error_type else None
    values: dict[str, Any] = {"message": "said so", "last_step": 0, "ended_at": NOW, "first_failure": failure}
    return ExitFile(attempt_id=attempt, reason=reason, **(values | fields))


def put_exit(store: ObjectStore, attempt: str, reason: ExitReason, **fields: Any) -> None:
    """What a driver writes last."""
    parse_attempt_id(attempt)
    store.put(exit_key(attempt), make_exit(attempt, reason, **fields).model_dump_json().encode())
