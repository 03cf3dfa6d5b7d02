"""Jobs, attempts, checkpoints and logs as the rest of the system would leave them, for tests of the API."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.testclient import TestClient

from configs.ids import attempt_id, checkpoint_id
from configs.layout import checkpoint_prefix, log_chunk_key
from configs.model import VitConfig
from configs.states import AttemptState, JobState
from configs.wire import LogLine, Preprocess
from orchestrator.control.transitions import transition
from orchestrator.storage.db import Database
from orchestrator.storage.tables import AttemptRow, CheckpointRow, JobRow
from tests.fakes.memory_store import MemoryStore

T0 = datetime(2026, 1, 1, tzinfo=UTC)
PRETRAIN: dict[str, Any] = {
    "kind": "pretrain",
    "name": "small",
    "model": {"patch_size": 7, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_dim": 128, "image_size": 28},
    "data": {"source": {"type": "synthetic", "num_train": 1024, "num_classes": 10, "image_size": 28}},
    "schedule": {"total_steps": 100},
    "train": {"global_batch_size": 64},
    "resources": {"workers": 2, "gpus_per_worker": 0},
}
MODEL = VitConfig(
    patch_size=7, embed_dim=64, depth=2, num_heads=4, mlp_dim=128, image_size=(28, 28), in_channels=3, num_classes=10
)
PREPROCESS = Preprocess(image_size=(28, 28), in_channels=3, mean=(0.5,), std=(0.5,))


def spec_with(**changes: Any) -> dict[str, Any]:
    """PRETRAIN with dotted keys (double underscores) set: spec_with(train__global_batch_size=65)."""
    spec = copy.deepcopy(PRETRAIN)
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        here = spec
        for part in path:
            here = here.setdefault(part, {})
        here[last] = value
    return spec


def submit(api: TestClient, **changes: Any) -> dict[str, Any]:
    """A job queued through the API."""
    response = api.post("/v1/jobs", json={"spec": spec_with(**changes)})
    assert response.status_code == 201, response.text
    job: dict[str, Any] = response.json()
    return job


def move(db: Database, job_id: str, *states: JobState, reason: str | None = None, at: datetime | None = None) -> None:
    """Move a job along, as the reconciler does."""
    with db.session() as session:
        job = session.get_one(JobRow, job_id)
        for state in states:
            transition(session, job, state, reason=reason, actor="test", at=at)


def add_attempt(db: Database, job_id: str, number: int = 1, **fields: Any) -> str:
    """An attempt of the job, by default running since T0 from the start. Returns its id."""
    values: dict[str, Any] = {"state": AttemptState.RUNNING, "world_size": 2, "created_at": T0, **fields}
    with db.session() as session:
        session.add(AttemptRow(id=attempt_id(job_id, number), job_id=job_id, number=number, **values))
        session.get_one(JobRow, job_id).num_attempts = number
    return attempt_id(job_id, number)


def add_checkpoint(db: Database, job_id: str, step: int, attempt: int = 1, **fields: Any) -> str:
    """A registered checkpoint (its files are not made). Returns its id."""
    values: dict[str, Any] = {
        "prefix": checkpoint_prefix(job_id, step, attempt),
        "num_bytes": 1000,
        "metrics": {"eval/top1": step / 1000},
        "model": MODEL.model_dump(mode="json"),
        "preprocess": PREPROCESS.model_dump(mode="json"),
        "valid": True,
        "created_at": T0,
        **fields,
    }
    with db.session() as session:
        row = CheckpointRow(
            id=checkpoint_id(job_id, step, attempt), job_id=job_id, step=step, attempt=attempt, **values
        )
        session.add(row)
        return row.id


def add_log_chunk(
    store: MemoryStore, attempt: str, stream: str, chunk: int, lines: Sequence[tuple[float, str]]
) -> None:
    """A chunk as a courier ships it: lines of (seconds after T0, message); 'error: …' is an error."""
    made = [
        LogLine(
            t=T0 + timedelta(seconds=seconds),
            stream=stream,
            level="error" if message.startswith("error") else "info",
            msg=message,
        )
        for seconds, message in lines
    ]
    store.put(log_chunk_key(attempt, stream, chunk), "".join(f"{line.model_dump_json()}\n" for line in made).encode())
