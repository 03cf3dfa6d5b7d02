"""A page of jobs as the API writes it: the same as the models say, whatever the jobs are."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from starlette.testclient import TestClient

from configs.load import KINDS
from configs.states import AttemptState, Desired, JobState
from configs.wire import Heartbeat, RankFailure
from orchestrator.schemas import JobPage
from orchestrator.services.auth import Actor
from orchestrator.services.jobs import JobFilter, get_job, get_job_json, list_jobs, list_jobs_json
from orchestrator.services.submission import queue_import
from orchestrator.storage.db import Database
from orchestrator.storage.tables import JobRow
from tests.orchestrator.rows import MODEL, PRETRAIN, T0, add_attempt, add_checkpoint, move, spec_with, submit

pytestmark = pytest.mark.db
PRESET = "demo/fashion-mnist-pretrain"
ON_CPU = {"gpus_per_worker": 0}
ODD = 'a "preset":"none" \\ </script> é 𝒳'


@pytest.fixture
def jobs(api: TestClient, db: Database) -> dict[str, str]:
    """One job of each kind, and some that are odd or have gone far; by what they are."""

    def post(spec: dict[str, Any]) -> str:
        response = api.post("/v1/jobs", json={"spec": spec})
        assert response.status_code == 201, response.text
        job_id: str = response.json()["id"]
        return job_id

    made = {"pretrain": submit(api)["id"]}
    checkpoint = add_checkpoint(db, made["pretrain"], 50)
    of_it = {"init_from": checkpoint, "resources": ON_CPU}
    made |= {kind: post({"kind": kind, **of_it}) for kind in ("evaluate", "inspect", "export")}
    finetune = {key: PRETRAIN[key] for key in ("data", "schedule", "train", "resources")}
    made["finetune"] = post({"kind": "finetune", "model": {"image_size": 28}, "init_from": checkpoint, **finetune})
    space = {"optim.lr": {"type": "log_uniform", "low": 1e-4, "high": 1e-1}}
    base = PRETRAIN | {"eval": {"every_steps": 10}, "checkpoint": {"every_steps": 10}}
    made["search"] = post({"kind": "search", "base": base, "space": space, "budget": {"trials": 2}})
    with db.session() as session:
        made["import"] = queue_import(session, Actor("tok_test", "root", "admin"), _import())
    made["of a preset"] = post({"preset": PRESET, "labels": {"team": ODD}})
    made["odd"] = post(spec_with(name=ODD, labels={ODD[:9]: ODD}))
    made["failed"], made["running"], made["trial"] = (submit(api)["id"] for _ in range(3))
    _go_far(db, made)
    return made


def _import() -> dict[str, Any]:
    file = {"upload": "upl_01M8B6S65HJS88TP8M1NR8F44N", "name": "vit.npz", "num_bytes": 10, "sha256": "0" * 64}
    return {
        "kind": "import",
        "file": file,
        "resources": {"workers": 1, **ON_CPU},
        "config": MODEL.model_dump(mode="json"),
    }


def _go_far(db: Database, made: dict[str, str]) -> None:
    beat = Heartbeat(rank=0, node="n1", pid=7, phase="training", step=40, at=T0).model_dump(mode="json")
    failure = RankFailure(rank=1, error_type="OSError", message=ODD, last_lines=(ODD,)).model_dump(mode="json")
    ended = {"message": ODD, "first_failure": failure}
    exited = {"exit_reason": "WORKER_OOM", "exit": ended, "ended_at": T0, "nodes": ["n1", "n2"], "ranks": {"0": beat}}
    add_attempt(db, made["failed"], state=AttemptState.ENDED, **exited)
    move(db, made["failed"], JobState.PREPARING, JobState.FAILED, reason="WORKER_OOM", at=T0)
    add_attempt(db, made["running"], state=AttemptState.ENDED, to_step=20)
    later = {"first_step_at": T0, "last_progress_at": T0 + timedelta(seconds=7)}
    add_attempt(db, made["running"], 2, from_step=20, to_step=41, ranks={"0": beat}, **later)
    move(db, made["running"], JobState.PREPARING, JobState.RUNNING, at=T0)
    move(db, made["evaluate"], JobState.PREPARING, JobState.SUCCEEDED, at=T0)
    with db.session() as session:
        running = session.get_one(JobRow, made["running"])
        running.step, running.gpu_seconds, running.last_metrics = 41, 0.1 + 0.2, {"train/loss": None, "train/lr": 1e-05}
        session.get_one(JobRow, made["export"]).desired = Desired.PAUSE
        # As a trial is stored whose settings give no valid job.
        trial = session.get_one(JobRow, made["trial"])
        trial.search_id, trial.plan = made["search"], {}
        trial.spec_json = json.dumps({"kind": "pretrain", "preset": PRESET}, sort_keys=True).encode()


@pytest.mark.parametrize("sort", ["-created", "name"])
def test_a_page_says_what_the_models_say(db: Database, jobs: dict[str, str], sort: Any) -> None:
    for wanted in (JobFilter(), JobFilter(search=jobs["search"]), JobFilter(kind="pretrain")):
        as_models = list_jobs(db, wanted, 50, None, sort)
        page = json.loads(list_jobs_json(db, wanted, 50, None, sort, num_matching=3))
        assert page == json.loads(as_models.model_copy(update={"num_matching": 3}).model_dump_json())
        assert JobPage.model_validate(page).items == as_models.items
    everything = {job.id: job for job in list_jobs(db, JobFilter(), 50, None).items}
    assert {job.kind for job in everything.values()} == set(KINDS)
    assert set(everything) == set(jobs.values()) - {jobs["trial"]}
    assert everything[jobs["of a preset"]].preset == PRESET
    assert everything[jobs["odd"]].preset is None
    assert [job.preset for job in list_jobs(db, JobFilter(search=jobs["search"]), 50, None).items] == [PRESET]
    assert everything[jobs["running"]].progress.eta_s is not None
    assert everything[jobs["failed"]].attempts[0].first_failure is not None


def test_a_job_says_what_the_model_says(api: TestClient, db: Database, jobs: dict[str, str]) -> None:
    for job_id in jobs.values():
        model = get_job(db, job_id)
        document, etag = get_job_json(db, job_id)
        assert json.loads(document) == json.loads(model.model_dump_json())
        assert etag == model.etag == api.get(f"/v1/jobs/{job_id}").headers["ETag"]


def test_pages_follow_each_other(api: TestClient, jobs: dict[str, str]) -> None:
    seen, cursor = [], ""
    while cursor is not None:
        page = api.get("/v1/jobs", params={"limit": 5, "count": True, **({"cursor": cursor} if cursor else {})}).json()
        assert page["num_matching"] == len(jobs) - 1, "trials are their search's"
        seen += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
    assert sorted(seen) == sorted(set(jobs.values()) - {jobs["trial"]})
