"""Bad input: every fault is named with its pointer as application/problem+json, and nothing is stored of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import func, select
from starlette.testclient import TestClient

from configs.states import JobState
from orchestrator.api.middleware import MAX_BODY_BYTES
from orchestrator.schemas import Problem
from orchestrator.storage.db import Database
from orchestrator.storage.tables import EventRow, IdempotencyRow, JobRow
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.rows import PRETRAIN, add_checkpoint, move, spec_with, submit

NO_JOB = "job_01JD3Q8Z6M0000000000000000"


def refused(api: TestClient, db: Database, spec: Any, status: int = 422, **body: Any) -> Problem:
    """The problem that a submission is refused with, after checking that no trace of it is left."""
    before = _counts(db)
    response = api.post("/v1/jobs", json={"spec": spec, **body})
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    assert _counts(db) == before
    problem = Problem.model_validate_json(response.content)
    assert (problem.status, problem.instance) == (status, "/v1/jobs")
    assert problem.title
    assert problem.detail
    return problem


def _counts(db: Database) -> list[int | None]:
    with db.reader() as session:
        return [session.scalar(select(func.count()).select_from(row)) for row in (JobRow, EventRow, IdempotencyRow)]


@pytest.mark.parametrize(
    ("changes", "pointer", "says"),
    [
        ({"optim__learning_rate": 0.1}, "/optim/learning_rate", "unknown field"),
        ({"train__global_batch_sise": 64}, "/train/global_batch_sise", "Did you mean global_batch_size"),
        ({"train__seed": "seven"}, "/train/seed", "a whole number"),
        ({"train__seed": 1.5}, "/train/seed", "a whole number"),
        ({"optim__lr": -0.1}, "/optim/lr", "a number above 0"),
        ({"schedule__total_steps": 10**30}, "/schedule/total_steps", "a number of at most"),
        ({"model": []}, "/model", "a mapping"),
        ({"zero__stage": 4}, "/zero/stage", "one of 0, 1, 2 or 3"),
        ({"train__global_batch_size": 65}, "/train/global_batch_size", "cannot be divided among 2 workers"),
        ({"train__micro_batch_size": 5}, "/train/micro_batch_size", "does not divide"),
        ({"train__global_batch_size": 2048}, "/train/global_batch_size", "more than the 1024 training examples"),
        ({"model__image_size": 30}, "/model/image_size", "30 is not a multiple of patch_size 7"),
        ({"model__num_heads": 5}, "/model/embed_dim", "not a multiple of num_heads"),
        ({"model__num_classes": 11}, "/model/num_classes", "which has 10 classes"),
        ({"model__num_classes": 0}, "/model/num_classes", "at least 1"),
        ({"data__train": "validation"}, "/data/train", "no such split"),
        ({"data__source": {"type": "folder", "name": "flowers"}}, "/data/source/name", "not registered"),
        ({"data__source": {"type": "torchvision", "name": "CIFAR11"}}, "/data/source/name", "CIFAR10"),
        ({"data__source": {"type": "parquet"}}, "/data/source/type", "not available yet"),
        ({"data__source": {"type": "http", "url": "http://169.254.169.254/"}}, "/data/source/type", "synthetic"),
        ({"kind": "prtrain"}, "/kind", "pretrain"),
        ({"name": "two\nlines"}, "/name", "text matching"),
        ({"labels": {"a": "\x00"}}, "/labels/a", "text matching"),
        ({"queue__project": "../etc"}, "/queue/project", "text matching"),
        ({"queue__depends_on": [NO_JOB]}, "/queue/depends_on/0", "there is no job"),
        ({"queue__depends_on": ["x"]}, "/queue/depends_on/0", "there is no job"),
        ({"preset": "paper/nothing"}, "/preset", "unknown preset"),
    ],
)
def test_a_wrong_field_is_named(
    api: TestClient, db: Database, changes: dict[str, Any], pointer: str, says: str
) -> None:
    problem = refused(api, db, spec_with(**changes))
    assert problem.code == "spec_invalid"
    assert [error.pointer for error in problem.errors] == [pointer]
    assert says in problem.errors[0].message
    assert problem.hint


def test_a_wrong_value_comes_with_what_is_allowed(api: TestClient, db: Database) -> None:
    error = refused(api, db, spec_with(model__num_classes=11)).errors[0]
    assert (error.value, error.allowed) == (11, "10")


def test_everything_wrong_is_said_at_once(api: TestClient, db: Database) -> None:
    spec = spec_with(train__seed="x", optim__lr=0, surprise=1)
    assert {e.pointer for e in refused(api, db, spec).errors} == {"/train/seed", "/optim/lr", "/surprise"}
    spec = spec_with(
        kind="finetune",
        init_from="ckpt_unknown",
        data__source={"type": "folder", "name": "x"},
        queue__depends_on=[NO_JOB],
    )
    problem = refused(api, db, spec)
    assert {e.pointer for e in problem.errors} == {"/init_from", "/data/source/name", "/queue/depends_on/0"}
    assert "and 2 more" in problem.detail


@pytest.mark.parametrize(
    ("config", "pointer"),
    [({"depth": "many"}, "/config/depth"), ({"resnet": {"layers": [1], "width": 48}}, "/config/resnet/width")],
)
def test_a_wrong_configuration_of_an_import_is_named(api: TestClient, config: dict[str, Any], pointer: str) -> None:
    body = {"file": "a.npz", "num_bytes": 9, "sha256": "0" * 64, "config": config}
    answer = api.post("/v1/checkpoints:import", json=body)
    assert answer.status_code == 422
    assert pointer in {error["pointer"] for error in answer.json()["errors"]}


def test_overrides_are_checked_like_the_rest(api: TestClient, db: Database) -> None:
    problem = refused(api, db, PRETRAIN, overrides={"train.global_batch_size": "sixty"})
    assert [error.pointer for error in problem.errors] == ["/train/global_batch_size"]


# -- checkpoints that are not there -----------------------------------------------------------------------------------
def finetune(reference: str, **changes: Any) -> dict[str, Any]:
    spec = spec_with(kind="finetune", init_from=reference, **changes)
    spec["model"] = {"image_size": 42}
    return spec


@pytest.mark.parametrize("reference", [f"{NO_JOB}/best", "ckpt_01JD3Q8Z6M0000000000000000_s000000010_a0001", "ckpt_x"])
def test_a_missing_checkpoint_is_named(api: TestClient, db: Database, reference: str) -> None:
    problem = refused(api, db, finetune(reference))
    assert [error.pointer for error in problem.errors] == ["/init_from"]
    assert problem.errors[0].value == reference
    evaluate = {"kind": "evaluate", "init_from": reference, "resources": {"gpus_per_worker": 0}}
    assert [error.pointer for error in refused(api, db, evaluate).errors] == ["/init_from"]


@pytest.mark.parametrize("reference", ["s3://bucket/x", "../../etc/passwd", "job_x/best", f"{NO_JOB}/worst", 7])
def test_what_is_no_checkpoint_reference_is_refused(api: TestClient, db: Database, reference: object) -> None:
    problem = refused(api, db, finetune(reference))  # type: ignore[arg-type]
    assert [error.pointer for error in problem.errors] == ["/init_from"]


@pytest.mark.db
def test_a_job_may_start_from_one_it_waits_for_and_from_no_other_unfinished_one(api: TestClient, db: Database) -> None:
    source = submit(api)["id"]
    reference = f"{source}/best"
    problem = refused(api, db, finetune(reference))
    assert problem.errors[0].allowed == f"queue.depends_on: [{source}]"

    waiting = api.post("/v1/jobs", json={"spec": finetune(reference, queue__depends_on=[source])})
    assert waiting.status_code == 201, waiting.text
    assert waiting.json()["init_from"] == reference
    assert waiting.json()["spec"]["model"]["embed_dim"] == 64
    assert waiting.json()["spec"]["model"]["image_size"] == 42

    move(db, source, JobState.FAILED)
    problem = refused(api, db, finetune(reference, queue__depends_on=[source]))
    assert {error.pointer for error in problem.errors} == {"/init_from", "/queue/depends_on/0"}


@pytest.mark.db
def test_best_and_latest_are_pinned_to_a_checkpoint_at_submission(api: TestClient, db: Database) -> None:
    source = submit(api)["id"]
    best = add_checkpoint(db, source, 40, metrics={"eval/top1": 0.9})
    latest = add_checkpoint(db, source, 60, metrics={"eval/top1": 0.5})
    move(db, source, JobState.FAILED)
    for which, expected in (("best", best), ("latest", latest)):
        job = api.post("/v1/jobs", json={"spec": finetune(f"{source}/{which}")}).json()
        assert job["init_from"] == expected
        assert job["spec"]["init_from"] == f"{source}/{which}"
    evaluate = {"kind": "evaluate", "init_from": latest, "resources": {"gpus_per_worker": 0}}
    job = api.post("/v1/jobs", json={"spec": evaluate}).json()
    assert job["spec"]["data"]["source"]["type"] == "synthetic"
    assert job["progress"]["total_steps"] is None


def test_a_deleted_checkpoint_is_missing(api: TestClient, db: Database) -> None:
    source = submit(api)["id"]
    checkpoint = add_checkpoint(db, source, 40, deleted_at=None, valid=False)
    move(db, source, JobState.FAILED)
    assert refused(api, db, finetune(checkpoint)).errors[0].pointer == "/init_from"
    assert "ended without a checkpoint" in refused(api, db, finetune(f"{source}/best")).errors[0].message


def test_a_fine_tune_that_contradicts_its_checkpoint_is_refused(api: TestClient, db: Database) -> None:
    source = submit(api)["id"]
    checkpoint = add_checkpoint(db, source, 40)
    spec = finetune(checkpoint)
    spec["model"] = {"image_size": 40}
    assert refused(api, db, spec).errors[0].pointer == "/model/image_size"


# -- bodies ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "mapping"),
        (b"[]", "mapping"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"spec": {"kind": "pretrain", "kind": "pretrain"}}', "given twice"),
        (b'{"spec": {"optim": {"lr": NaN}}}', "finite"),
        (b'{"spec": {"optim": {"lr": 1e999}}}', "finite"),
        (b'{"spec": ' + b'{"a":' * 40 + b"1" + b"}" * 40 + b"}", "32 levels"),
        (b'{"spec": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "32 levels"),
        (b'{"spec": {"name": "\\ud800"}}', "Unicode"),
        (b'{"sepc": {}}', "sepc"),
        (b'{"spec": 3}', "mapping"),
        (b'{"spec": {}, "overrides": []}', "mapping"),
        (b'{"spec": {}, "gpu": "H100"}', "gpu"),
        (b'{"spec": {"kind": "pretrain"', "expected"),
    ],
)
def test_a_body_that_is_no_submission_is_refused(api: TestClient, db: Database, body: bytes, says: str) -> None:
    response = api.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert says in response.text
    assert _counts(db) == [0, 0, 0]


def test_a_yaml_bomb_is_refused(api: TestClient) -> None:
    lines = [
        "a: &a [x, x, x]",
        *(f"{new}: &{new} [*{old}, *{old}, *{old}]" for old, new in zip("abc", "bcd", strict=True)),
    ]
    response = api.post("/v1/jobs", content="\n".join(lines), headers={"Content-Type": "application/yaml"})
    assert response.status_code == 422
    assert "aliases" in response.text


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/plans", "/v1/datasets", "/v1/tokens"])
def test_a_body_over_one_mebibyte_is_refused_by_its_length(api: TestClient, db: Database, path: str) -> None:
    body = json.dumps({"spec": spec_with(name="x" * MAX_BODY_BYTES)})
    response = api.post(path, content=body)
    assert response.status_code == 413
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.json()["code"] == "body_too_large"
    assert _counts(db) == [0, 0, 0]


def test_a_body_over_one_mebibyte_is_refused_while_it_streams(api: TestClient, db: Database) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        while sent < 3 * MAX_BODY_BYTES:
            sent += 65536
            yield b" " * 65536

    response = api.post("/v1/jobs", content=chunks())
    assert response.status_code == 413
    assert _counts(db) == [0, 0, 0]


def test_a_body_of_just_under_one_mebibyte_is_read(api: TestClient) -> None:
    body = json.dumps({"spec": spec_with()}).encode()
    padded = body + b" " * (MAX_BODY_BYTES - len(body))
    assert api.post("/v1/jobs", content=padded).status_code == 201


def test_what_does_not_exist_is_a_problem_too(api: TestClient) -> None:
    missing = api.get("/v1/nothing")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    wrong = api.put("/v1/jobs", json={})
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert wrong.headers["Content-Type"] == missing.headers["Content-Type"] == "application/problem+json"


def test_a_fault_of_ours_says_nothing_of_our_insides(api: TestClient, db: Database) -> None:
    with db.session() as session:
        session.connection().exec_driver_sql("ALTER TABLE events RENAME TO gone")
    response = api.post("/v1/jobs", json={"spec": spec_with()})
    assert response.status_code == 500
    assert response.json()["code"] == "internal"
    assert "events" not in response.text


def test_a_store_that_is_away_is_said_so(api: TestClient, db: Database, store: MemoryStore) -> None:
    job_id = submit(api)["id"]
    store.fail_next = 1
    response = api.get(f"/v1/jobs/{job_id}/report")
    assert response.status_code == 503
    assert response.json()["code"] == "store_unavailable"
    assert "Retry-After" in response.headers
