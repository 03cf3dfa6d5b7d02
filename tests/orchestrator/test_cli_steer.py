"""edit, fork, compare, lineage, overview and checkpoints of the command line, against the real routes."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from configs.states import JobState
from orchestrator.cli.main import run
from orchestrator.cli.options import Wiring
from orchestrator.storage.db import Database
from orchestrator.storage.tables import JobRow, MetricRow
from tests.orchestrator.conftest import ADMIN_TOKEN
from tests.orchestrator.rows import T0, add_attempt, add_checkpoint, move, submit

Patchwork = Callable[..., str]


@pytest.fixture
def patchwork(api: TestClient, capsys: pytest.CaptureFixture[str]) -> Patchwork:
    """Runs a command; what it printed. `code` is the exit status that it should have."""

    def forward(request: httpx.Request) -> httpx.Response:
        path, headers = request.url.raw_path.decode(), dict(request.headers)
        answer = api.request(request.method, path, content=request.content, headers=headers)
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)

    def call(*arguments: str, code: int = 0) -> str:
        server = ("--url", "http://testserver", "--token", ADMIN_TOKEN)
        status = run([*arguments, *server], Wiring(httpx.MockTransport(forward)))
        printed = capsys.readouterr()
        assert status == code, printed.err
        return printed.out if code == 0 else printed.err

    return call


def document(said: str) -> Any:
    """The JSON that was printed, after the lines that the service logs to the same place here."""
    return json.loads(said[said.index("{\n") :])


def add_points(db: Database, job_id: str, name: str, values: list[float]) -> None:
    with db.session() as session:
        for step, value in enumerate(values, 1):
            at = T0 + timedelta(seconds=step)
            session.add(MetricRow(job_id=job_id, name=name, step=step, attempt=1, value=value, at=at))


def test_edit_changes_what_is_given_and_keeps_the_rest(api: TestClient, patchwork: Patchwork) -> None:
    job_id = submit(api, labels={"team": "vision", "draft": "yes"})["id"]
    said = patchwork("edit", job_id, "--priority", "90", "--label", "paper=yes", "--unlabel", "draft")
    assert "priority 90, labels paper=yes, team=vision" in said
    job = api.get(f"/v1/jobs/{job_id}").json()
    assert (job["priority"], job["labels"]) == (90, {"team": "vision", "paper": "yes"})
    assert "give --priority, --label or --unlabel" in patchwork("edit", job_id, code=2)
    assert "expected KEY=VALUE" in patchwork("edit", job_id, "--label", "paper", code=2)
    assert document(patchwork("edit", "last", "--priority", "10", "--json"))["priority"] == 10


def test_fork_submits_a_changed_copy(api: TestClient, db: Database, patchwork: Patchwork) -> None:
    job_id = submit(api)["id"]
    add_attempt(db, job_id, 1, to_step=40)
    checkpoint = add_checkpoint(db, job_id, 40)
    made = document(patchwork("fork", job_id, "--set", "optim.lr=0.5", "--name", "other", "--json"))
    assert (made["name"], made["spec"]["optim"]["lr"], made["resume_from"]) == ("other", 0.5, None)
    said = patchwork("fork", job_id, "--from", "latest", "--set", "resources.workers=1")
    assert f"from {checkpoint}" in said
    refused = patchwork("fork", job_id, "--from", "latest", "--set", "optim.lr=0.5", code=2)
    assert "the changes alter what is learned" in refused


def test_compare_lays_curves_and_descriptions_side_by_side(api: TestClient, db: Database, patchwork: Patchwork) -> None:
    ids = [submit(api, name=name, optim={"name": "adamw", "lr": lr})["id"] for name, lr in (("a", 0.1), ("b", 0.2))]
    for number, job_id in enumerate(ids):
        add_attempt(db, job_id, 1, to_step=3)
        add_points(db, job_id, "train/loss", [2.0, 1.0 + number, 0.5 + number])
    said = patchwork("compare", *ids)
    assert "TRAIN/LOSS" in said
    assert "/optim/lr" in said
    found = document(patchwork("compare", *ids, "-m", "train/loss", "--json"))
    assert [series["last"] for series in found["series"]] == [0.5, 1.5]
    assert "is given twice" in patchwork("compare", ids[0], ids[0], code=2)


def test_lineage_says_what_came_of_what(api: TestClient, db: Database, patchwork: Patchwork) -> None:
    job_id = submit(api, name="first")["id"]
    add_attempt(db, job_id, 1, to_step=40)
    checkpoint = add_checkpoint(db, job_id, 40)
    fork = document(patchwork("fork", job_id, "--from", "latest", "--name", "second", "--json"))["id"]
    said = "".join(patchwork("lineage", fork).split())
    assert f"forkoffirst({checkpoint})" in said
    assert [job["id"] for job in document(patchwork("lineage", job_id, "--json"))["jobs"]] == [job_id, fork]


def test_overview_shows_who_runs_waits_and_failed(api: TestClient, db: Database, patchwork: Patchwork) -> None:
    assert "none yet" in patchwork("overview")
    running, failed = submit(api, name="it-runs")["id"], submit(api, name="it-failed")["id"]
    submit(api, name="it-waits")
    move(db, running, JobState.PREPARING, JobState.RUNNING)
    move(db, failed, JobState.FAILED)
    with db.session() as session:
        session.get_one(JobRow, failed).reason = "OOM_GPU"
    said = patchwork("overview")
    assert "1 running" in said
    for name in ("it-runs", "it-waits", "it-failed", "OOM_GPU"):
        assert name in said
    assert document(patchwork("overview", "--json"))["counts"]["QUEUED"] == 1


def test_checkpoints_are_pinned_and_let_go_of(api: TestClient, db: Database, patchwork: Patchwork) -> None:
    job_id = submit(api)["id"]
    checkpoint = add_checkpoint(db, job_id, 40)
    assert f"{checkpoint} is kept." in patchwork("checkpoints", "pin", f"{job_id}/latest")
    assert "pinned" in patchwork("checkpoints", "list", job_id)
    assert "is not pinned" in patchwork("checkpoints", "unpin", checkpoint)
    assert "pinned" not in patchwork("checkpoints", "list", job_id)
