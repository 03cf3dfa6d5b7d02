"""VTAB suites over HTTP and on the command line: all jobs or none; a report that waits for what is not known yet."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from sqlalchemy import func, select
from starlette.testclient import TestClient

from configs.states import JobState
from orchestrator.cli.main import run
from orchestrator.cli.options import Wiring
from orchestrator.storage.db import Database
from orchestrator.storage.tables import JobRow
from orchestrator.vtab_schemas import VtabReport
from tests.orchestrator.conftest import ADMIN_TOKEN, headers_for
from tests.orchestrator.rows import add_attempt, add_checkpoint, move, submit

SETTINGS = {"model.image_size": 28, "resources.gpus_per_worker": 0}


def synthetic(seed_classes: int) -> dict[str, Any]:
    return {"type": "synthetic", "num_train": 1200, "num_classes": seed_classes, "image_size": 28}


def tasks() -> list[dict[str, Any]]:
    return [
        {"name": "fashion", "group": "natural", "source": {"type": "torchvision", "name": "FashionMNIST"}},
        {"name": "digits", "group": "natural", "source": {"type": "torchvision", "name": "MNIST"}},
        {"name": "stripes", "group": "structured", "source": synthetic(4)},
    ]


@pytest.fixture
def checkpoint(api: TestClient, db: Database) -> str:
    job = submit(api)["id"]
    add_attempt(db, job)
    return add_checkpoint(db, job, 100)


def suite(checkpoint: str, **changes: Any) -> dict[str, Any]:
    return {"name": "small", "init_from": checkpoint, "tasks": tasks(), "steps": 50, "overrides": SETTINGS} | changes


def finish(db: Database, job_id: str, top1: float) -> None:
    move(db, job_id, JobState.PREPARING, JobState.RUNNING)
    with db.session() as session:
        session.get_one(JobRow, job_id).last_metrics = {"eval/top1": top1}
    move(db, job_id, JobState.SUCCEEDED)


def over(api: TestClient) -> Wiring:
    """The command line on the tests' API."""

    def handle(request: httpx.Request) -> httpx.Response:
        kept = {name: request.headers[name] for name in ("content-type", "idempotency-key") if name in request.headers}
        path = request.url.raw_path.decode()
        answer = api.request(request.method, path, content=request.content, headers=kept)
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)

    return Wiring(httpx.MockTransport(handle))


def num_jobs(db: Database) -> int:
    with db.reader() as session:
        return session.scalar(select(func.count()).select_from(JobRow)) or 0


@pytest.mark.db
def test_a_suite_is_a_fine_tune_for_each_data_set(api: TestClient, checkpoint: str) -> None:
    response = api.post("/v1/vtab", json=suite(checkpoint))
    assert response.status_code == 201, response.text
    assert response.headers["Location"] == "/v1/vtab/small"
    report = VtabReport.model_validate_json(response.content)
    assert [(r.task, r.group, r.state, r.top1) for r in report.results] == [
        ("fashion", "natural", "QUEUED", None),
        ("digits", "natural", "QUEUED", None),
        ("stripes", "structured", "QUEUED", None),
    ]
    assert report.split == "test"
    assert report.init_from == checkpoint
    job = api.get(f"/v1/jobs/{report.results[0].job_id}").json()
    assert job["labels"] == {"vtab": "small", "vtab_task": "fashion", "vtab_group": "natural"}
    spec = job["spec"]
    assert spec["data"]["subset"]["examples"] == 1000
    assert spec["data"]["holdout"] is None
    assert (spec["optim"]["name"], spec["optim"]["lr"], spec["optim"]["momentum"]) == ("sgd", 0.01, 0.9)
    assert (spec["schedule"]["total_steps"], spec["schedule"]["warmup_steps"]) == (50, 5)
    assert spec["train"]["global_batch_size"] == 512
    assert spec["model"]["image_size"] == 28
    assert spec["model"]["num_classes"] == 10
    page = api.get("/v1/jobs", params={"label": "vtab=small"}).json()
    assert len(page["items"]) == 3


@pytest.mark.db
def test_means_wait_for_every_data_set(api: TestClient, db: Database, checkpoint: str) -> None:
    results = VtabReport.model_validate_json(api.post("/v1/vtab", json=suite(checkpoint)).content).results
    finish(db, results[0].job_id, 0.5)
    finish(db, results[1].job_id, 0.75)
    report = VtabReport.model_validate_json(api.get("/v1/vtab/small").content)
    assert [r.top1 for r in report.results] == [0.5, 0.75, None]
    assert [(g.name, g.num_done, g.num_tasks, g.top1) for g in report.groups] == [
        ("natural", 2, 2, 0.625),
        ("structured", 0, 1, None),
    ]
    assert (report.num_done, report.top1) == (2, None)
    # The last one fails; its retry takes its place.
    failed = results[2].job_id
    move(db, failed, JobState.PREPARING, JobState.RUNNING)
    with db.session() as session:
        session.get_one(JobRow, failed).last_metrics = {"eval/top1": 0.1}
    move(db, failed, JobState.FAILED, reason="USER_ERROR")
    assert VtabReport.model_validate_json(api.get("/v1/vtab/small").content).results[2].top1 is None
    again = api.post(f"/v1/jobs/{failed}/retry").json()["id"]
    finish(db, again, 0.25)
    report = VtabReport.model_validate_json(api.get("/v1/vtab/small").content)
    assert report.results[2].job_id == again
    assert report.top1 == pytest.approx((0.5 + 0.75 + 0.25) / 3)
    assert report.groups[1].top1 == 0.25


def test_settings_may_be_chosen_on_images_held_out(api: TestClient, checkpoint: str) -> None:
    response = api.post("/v1/vtab", json=suite(checkpoint, held_out=True, seed=4))
    report = VtabReport.model_validate_json(response.content)
    assert report.split == "held out"
    data = api.get(f"/v1/jobs/{report.results[0].job_id}").json()["spec"]["data"]
    assert data["subset"] == {"examples": 1000, "fraction": None, "per_class": None, "seed": 4}
    assert data["holdout"] == {"examples": 200, "fraction": None, "of": "subset", "seed": 4}
    assert api.get(f"/v1/jobs/{report.results[0].job_id}").json()["plan"]["num_examples"] == 800


def test_everything_wrong_is_said_at_once_and_nothing_is_queued(api: TestClient, db: Database, checkpoint: str) -> None:
    before = num_jobs(db)
    wrong = tasks()
    wrong[0]["source"] = {"type": "folder", "name": "unknown"}
    wrong[1]["eval"] = "validation"
    wrong[2]["source"] = synthetic(4) | {"num_train": 900}
    response = api.post("/v1/vtab", json=suite(checkpoint, tasks=wrong))
    assert response.status_code == 422
    found = {error["pointer"]: error["message"] for error in response.json()["errors"]}
    assert set(found) == {"/tasks/0/source/name", "/tasks/1/eval", "/tasks/2/train"}
    assert "stripes: data.subset.examples 1000, split 'train' has 900" in found["/tasks/2/train"]
    response = api.post("/v1/vtab", json=suite(checkpoint, overrides=SETTINGS | {"optim.rate": 1}))
    (error,) = response.json()["errors"]
    assert error["pointer"] == "/overrides/optim/rate"
    response = api.post("/v1/vtab", json=suite("ckpt_gone"))
    assert [error["pointer"] for error in response.json()["errors"]] == ["/init_from"]
    response = api.post("/v1/vtab", json=suite(checkpoint, tasks=[tasks()[0], tasks()[0]]))
    assert response.json()["errors"][0]["pointer"] == "/tasks/1/name"
    response = api.post("/v1/vtab", json=suite(checkpoint, tasks=[]))
    assert response.json()["errors"][0]["pointer"] == "/tasks"
    assert num_jobs(db) == before


@pytest.mark.db
def test_a_name_is_used_once_and_a_request_repeated_answers_alike(
    api: TestClient, db: Database, checkpoint: str
) -> None:
    headers = {"Idempotency-Key": "k"}
    first = api.post("/v1/vtab", json=suite(checkpoint), headers=headers)
    jobs = num_jobs(db)
    again = api.post("/v1/vtab", json=suite(checkpoint), headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["Idempotent-Replayed"] == "true"
    assert api.post("/v1/vtab", json=suite(checkpoint)).status_code == 409
    assert api.post("/v1/vtab", json=suite(checkpoint, seed=1), headers=headers).status_code == 409
    assert num_jobs(db) == jobs
    for name in ("other", "a%00b", "%22%5C", "x" * 300, "SMALL"):
        assert api.get(f"/v1/vtab/{name}").status_code == 404
    viewer = headers_for(db, "viewer")
    assert api.post("/v1/vtab", json=suite(checkpoint, name="x"), headers=viewer).status_code == 403
    assert api.get("/v1/vtab/small", headers=viewer).status_code == 200


def test_the_suite_in_the_documents_is_one(api: TestClient, checkpoint: str) -> None:
    document = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text()
    (block,) = re.findall(r"^```json\n(.*?)^```", document, re.DOTALL | re.MULTILINE)
    body = suite(checkpoint) | json.loads(block)
    body["overrides"] = body["overrides"] | SETTINGS
    response = api.post("/v1/vtab", json=body)
    assert response.status_code == 201, response.text
    assert len(response.json()["results"]) == 3


def printed_json(capsys: pytest.CaptureFixture[str]) -> Any:
    """The document a command printed, after what the API logged in this process."""
    text = capsys.readouterr().out
    return json.loads(text[text.index("{\n") :])


def test_the_command_line_queues_and_reports(
    api: TestClient, db: Database, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump({"tasks": tasks(), "overrides": {"model.image_size": 28}}))
    server = ["--url", "http://testserver", "--token", ADMIN_TOKEN]
    wiring = over(api)
    given = ["--from", checkpoint, "--name", "small", "--steps", "20", "--set", "resources.gpus_per_worker=0"]
    assert run(["vtab", "run", str(file), *given, "--json", *server], wiring) == 0
    report = VtabReport.model_validate(printed_json(capsys))
    assert [result.total_steps for result in report.results] == [20, 20, 20]
    for number, result in enumerate(report.results):
        finish(db, result.job_id, 0.25 * number)
    assert run(["vtab", "report", "small", *server], wiring) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "fashion natural" in text
    assert "natural 2/2 12.50 %" in text
    assert "all 3/3 25.00 %" in text
    assert run(["vtab", "report", "small", "--json", *server], wiring) == 0
    assert printed_json(capsys)["top1"] == 0.25
    assert run(["vtab", "run", str(file), *given, *server], wiring) == 4
    assert "There is a suite 'small' already." in capsys.readouterr().err
    file.write_text("name: x")
    assert run(["vtab", "run", str(file), *server], wiring) == 2
    assert "expected them under tasks" in " ".join(capsys.readouterr().err.split())
