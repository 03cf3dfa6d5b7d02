"""The API against its own OpenAPI document: every operation, with examples, boundary values and generated requests,
over a real socket. Whatever is sent, the answer is one the document declares, of its content type and its schema."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import schemathesis
import uvicorn
from fastapi import FastAPI
from schemathesis import Case, HookContext
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import from_schema
from schemathesis.engine.events import EngineFinished, FatalError, NonFatalError, ScenarioFinished
from schemathesis.engine.recorder import ScenarioRecorder
from schemathesis.hooks import GLOBAL_HOOK_DISPATCHER
from starlette.testclient import TestClient

from configs.ids import checkpoint_id
from configs.layout import checkpoint_prefix, export_prefix, manifest_key, report_key
from configs.load import list_presets
from configs.states import JobState
from configs.wire import EvaluationReport, Manifest, MetricPoint, ReportBatch, ShardFile
from orchestrator.api.http import BoundedHttp
from orchestrator.services.reports import ingest_report
from orchestrator.storage.db import Database
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.conftest import ADMIN_TOKEN, WORKER_SECRET
from tests.orchestrator.rows import MODEL, PREPROCESS, add_attempt, add_checkpoint, add_log_chunk, move, submit
from tests.orchestrator.test_api_pictures import leave_pictures

SEED = 20261122
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
ADMIN = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
SHARD = "shards/weights-00000-of-00001.safetensors"
STEP = 40
NUM_EXAMPLES = 10
"""Generated requests for each operation, besides the examples and the boundary values."""


@dataclass(frozen=True)
class Known:
    """Things that exist, by the names of the path parameters that lead to them."""

    ended_job: dict[str, str]
    queued_job: dict[str, str]
    names: dict[str, dict[str, str]]
    """By the operation."""

    def fill(self, case: Case) -> None:
        """Point the request at things that exist. Streams are opened of the job that has ended: others never end."""
        operation = case.operation.definition.raw["operationId"]
        known = self.queued_job if operation in ("cancel_job", "pause_job", "resume_job") else self.ended_job
        known = known | self.names.get(operation, {})
        case.path_parameters = {name: known.get(name, value) for name, value in case.path_parameters.items()}


@pytest.fixture
def known(api: TestClient, db: Database, store: MemoryStore) -> Known:
    """A job that ended an hour ago and left all that a job can leave, and one that waits."""
    ended, queued = submit(api)["id"], submit(api)["id"]
    attempt = add_attempt(db, ended)
    points = [MetricPoint(name=n, step=s, value=1 / (s + 1), at=_ago(2)) for n in ("train/loss", "a") for s in range(9)]
    ingest_report(db, attempt, ReportBatch(seq=1, metrics=tuple(points)))
    move(db, ended, JobState.PREPARING, JobState.RUNNING, JobState.SUCCEEDED, at=_ago(1))
    add_log_chunk(store, attempt, "driver", 0, [(0, "start"), (5, "error: rank 1 is gone")])
    checkpoint = _add_whole_checkpoint(db, store, ended)
    store.put(f"{export_prefix(ended, 'safetensors')}model.safetensors", bytes(1024))
    report = EvaluationReport(
        job_id=ended,
        checkpoint_id=checkpoint,
        dataset="d",
        split="s",
        num_examples=1,
        metrics={"a": 1.0},
        created_at=_ago(1),
    )
    store.put(report_key(ended), report.model_dump_json().encode())
    leave_pictures(store, ended, "patch_filters")
    upload = api.post("/v1/checkpoints:import", json={"file": "a.npz", "num_bytes": 9, "sha256": "0" * 64}).json()["id"]
    return Known(
        ended_job={
            "job_id": ended,
            "attempt_id": attempt,
            "checkpoint_id": checkpoint,
            "fmt": "safetensors",
            "upload_id": upload,
        },
        queued_job={"job_id": queued},
        names={
            "get_checkpoint_file": {"name": SHARD},
            "get_export_file": {"name": "model.safetensors"},
            "get_picture": {"name": "patch_filters.png"},
            "get_preset": {"name": list_presets()[0].name},
            "get_dataset": {"name": "fashion_mnist"},
        },
    )


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The address of `app` on loopback, served as in production by uvicorn, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=BoundedHttp, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()


def _ago(hours: int) -> datetime:
    return datetime.now(UTC) - timedelta(hours=hours)


def _add_whole_checkpoint(db: Database, store: MemoryStore, job_id: str) -> str:
    prefix = checkpoint_prefix(job_id, STEP, 1)
    shard = ShardFile(name=SHARD, rank=0, role="weights", num_bytes=1024, crc32c=(1,), slices=())
    manifest = Manifest(
        checkpoint_id=checkpoint_id(job_id, STEP, 1),
        job_id=job_id,
        attempt=1,
        step=STEP,
        position=2560,
        total_steps=100,
        world_size=2,
        zero_stage=1,
        optimizer="adamw",
        optimizer_step=STEP,
        spec_hash="sha256:x",
        training_fingerprint="sha256:x",
        data_fingerprint="sha256:x",
        versions={"torch": "2"},
        metrics={"eval/top1": 0.5},
        model=MODEL,
        preprocess=PREPROCESS,
        tensors={"head.bias": (10,)},
        files=(shard,),
        nonce="n",
        created_at=_ago(1),
    )
    store.put(manifest_key(prefix), manifest.model_dump_json().encode())
    store.put(prefix + SHARD, bytes(1024))
    return add_checkpoint(db, job_id, STEP)


@dataclass(frozen=True)
class Outcome:
    """What a run of all operations found."""

    failures: list[str]
    operations: set[str]
    statuses: Counter[int]


@contextmanager
def before_each_call(prepare: Callable[[Case], None]) -> Iterator[None]:
    def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:
        prepare(case)

    schemathesis.hook(before_call)
    try:
        yield
    finally:
        GLOBAL_HOOK_DISPATCHER.unregister(before_call)


def try_all(app: FastAPI, prepare: Callable[[Case], None]) -> Outcome:
    """Send examples, boundary values and generated requests to every operation; `prepare` changes each beforehand."""
    outcome = Outcome([], set(), Counter())
    with serving(app) as url:
        config = SchemathesisConfig.from_dict(
            {
                "seed": SEED,
                "base-url": url,
                "request-timeout": 30,
                "continue-on-failure": True,
                "max-redirects": 0,
                "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}},
                "generation": {"deterministic": True, "max-examples": NUM_EXAMPLES, "no-shrink": True},
                # Ids out of earlier answers would open streams of jobs that never end.
                "phases": {
                    "stateful": {"enabled": False},
                    "coverage": {"extra-data-sources": {"responses": False}},
                    "fuzzing": {"extra-data-sources": {"responses": False}},
                },
            }
        )
        schema = schemathesis.openapi.from_dict(app.openapi(), config=config)

        with before_each_call(prepare):
            for event in from_schema(schema).execute():
                if isinstance(event, NonFatalError | FatalError):
                    outcome.failures.append(str(event))
                elif isinstance(event, ScenarioFinished):
                    _judge(event.recorder, outcome)
                elif isinstance(event, EngineFinished):
                    assert event.stop_reason == "completed", event
    return outcome


def _judge(recorder: ScenarioRecorder, outcome: Outcome) -> None:
    if recorder.cases:
        outcome.operations.add(recorder.label)
    for interaction in recorder.interactions.values():
        if interaction.response is not None:
            outcome.statuses[interaction.response.status_code] += 1
    for case_id, nodes in recorder.checks.items():
        for node in nodes:
            if node.failure_info is not None:
                request = recorder.cases[case_id].value.as_curl_command()
                outcome.failures.append(f"{recorder.label}: {node.failure_info.failure}\n    {request[:1000]}")


def check(app: FastAPI, outcome: Outcome) -> None:
    """Every operation was tried, and none failed."""
    document = app.openapi()
    all_of_them = {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}
    assert outcome.operations == all_of_them
    assert not outcome.failures, "\n".join([f"{len(outcome.failures)} failures", *outcome.failures])


def authorize(case: Case, headers: Mapping[str, str]) -> None:
    """Let the request in: drivers' operations want the worker secret."""
    given = {"Authorization": f"Bearer {WORKER_SECRET}"} if case.path.startswith("/internal/") else headers
    case.headers.update(given)


def test_an_anonymous_caller_gets_what_the_document_says(app: FastAPI) -> None:
    outcome = try_all(app, lambda case: None)
    check(app, outcome)
    assert outcome.statuses[401] > len(outcome.operations)


def test_an_administrator_gets_what_the_document_says(app: FastAPI) -> None:
    outcome = try_all(app, lambda case: authorize(case, ADMIN))
    check(app, outcome)
    assert {200, 201, 404, 422} <= set(outcome.statuses)


def test_so_does_an_administrator_who_names_things_that_exist(app: FastAPI, known: Known) -> None:
    def prepare(case: Case) -> None:
        authorize(case, ADMIN)
        known.fill(case)

    outcome = try_all(app, prepare)
    check(app, outcome)
    assert {200, 201, 202, 204, 206, 409, 422} <= set(outcome.statuses)
