"""Jobs over HTTP: submit, list, steer, retry; what is stored and what is not."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml
from sqlalchemy import func, select, update
from starlette.testclient import TestClient

from configs.states import JobState
from orchestrator.schemas import JobPublic
from orchestrator.storage.db import Database
from orchestrator.storage.tables import EventRow, IdempotencyRow, JobRow
from tests.orchestrator.conftest import headers_for
from tests.orchestrator.rows import T0, add_attempt, add_checkpoint, move, spec_with, submit


def num_jobs(db: Database) -> int:
    with db.reader() as session:
        return session.scalar(select(func.count()).select_from(JobRow)) or 0


@pytest.mark.db
def test_submission_stores_the_resolved_job_its_plan_and_an_event(api: TestClient, db: Database) -> None:
    response = api.post("/v1/jobs", json={"spec": spec_with(), "overrides": {"optim.lr": "3e-4"}})

    assert response.status_code == 201
    job = JobPublic.model_validate_json(response.content)
    assert response.headers["Location"] == f"/v1/jobs/{job.id}"
    assert job.state == "QUEUED"
    assert job.spec["optim"]["lr"] == 3e-4
    assert job.spec["model"]["num_classes"] == 10
    assert job.spec["train"]["micro_batch_size"] == 32
    assert job.submitted["overrides"] == {"optim.lr": "3e-4"}
    assert job.plan["allowed_world_sizes"] == [2]
    assert job.progress.total_steps == 100
    assert job.queue is not None
    assert job.queue.position == 1
    assert job.created_by == "root"
    found = api.get(f"/v1/jobs/{job.id}").json()
    assert found.pop("queue")["position"] == 1
    assert found == {name: value for name, value in response.json().items() if name != "queue"}
    events = api.get(f"/v1/jobs/{job.id}/events").json()["items"]
    assert [(event["type"], event["actor"]) for event in events] == [("job.queued", "root")]


def test_a_job_file_is_accepted_as_yaml(api: TestClient) -> None:
    response = api.post(
        "/v1/jobs", content=yaml.safe_dump(spec_with(name="from a file")), headers={"Content-Type": "application/yaml"}
    )
    assert response.status_code == 201
    assert response.json()["name"] == "from a file"


def test_a_preset_may_be_named_and_overridden(api: TestClient) -> None:
    body = {"spec": {"preset": "demo/fashion-mnist-pretrain"}, "overrides": {"train.seed": 7}}
    response = api.post("/v1/jobs", json=body)
    assert response.status_code == 201, response.text
    assert response.json()["preset"] == "demo/fashion-mnist-pretrain"
    assert response.json()["spec"]["train"]["seed"] == 7


def test_a_dry_run_says_what_would_be_stored_and_stores_nothing(api: TestClient, db: Database) -> None:
    response = api.post("/v1/jobs?dry_run=true", json={"spec": spec_with()})
    assert response.status_code == 200
    assert response.json()["spec_hash"].startswith("sha256:")
    assert response.json()["plan"]["steps"] == 100
    assert num_jobs(db) == 0


@pytest.mark.db
def test_hostile_text_stays_data(api: TestClient) -> None:
    name = "<script>alert(1)</script> \u202e\u2028'; DROP TABLE jobs; -- %s {0}"
    labels = {'"><img src=x>': "${jndi:x} \u202e"}
    job = submit(api, name=name, labels=labels)
    assert job["name"] == name
    assert api.get(f"/v1/jobs/{job['id']}").json()["labels"] == labels
    response = api.get("/v1/jobs", params={"name": "<script>"})
    assert [item["id"] for item in response.json()["items"]] == [job["id"]]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Type"] == "application/json"


@pytest.mark.db
def test_pages_hold_every_job_once_the_newest_first(api: TestClient, db: Database) -> None:
    made = [submit(api, name=f"job {index}")["id"] for index in range(5)]
    with db.session() as session:
        # Equal times: the id decides.
        session.execute(update(JobRow).where(JobRow.id.in_(made[1:4])).values(created_at=T0))
    expected = [
        item["id"] for item in sorted(api.get("/v1/jobs").json()["items"], key=lambda j: (j["created_at"], j["id"]))
    ][::-1]

    found, cursor = [], None
    while True:
        page = api.get("/v1/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        found += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == expected
    assert sorted(found) == sorted(made)


@pytest.mark.db
@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"kind": "pretrain"}, {"a", "b_100%"}),
        ({"kind": "evaluate"}, set()),
        ({"project": "vision"}, {"b_100%"}),
        ({"state": ["QUEUED", "RUNNING"]}, {"a", "b_100%"}),
        ({"state": "CANCELLED"}, set()),
        ({"label": "team=red"}, {"a"}),
        ({"label": ["team=red", "size=xl"]}, set()),
        ({"label": "team.x=blue"}, {"b_100%"}),
        ({"name": "B_100%"}, {"b_100%"}),
        ({"name": "_"}, {"b_100%"}),
    ],
)
def test_filters(api: TestClient, query: dict[str, Any], expected: set[str]) -> None:
    submit(api, name="a", labels={"team": "red"})
    submit(api, name="b_100%", labels={"team.x": "blue"}, queue__project="vision")
    assert {item["name"] for item in api.get("/v1/jobs", params=query).json()["items"]} == expected


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ({"cursor": "nonsense"}, "/cursor"),
        ({"cursor": "MjAyNi0wMS0wMXw="}, "/cursor"),
        ({"label": "no-equals-sign"}, "/label"),
        ({"limit": 0}, "/limit"),
        ({"limit": "many"}, "/limit"),
        ({"state": "SLEEPING"}, "/state/0"),
        ({"name": "a\x00b"}, "/name"),
    ],
)
def test_a_wrong_query_is_named(api: TestClient, query: dict[str, Any], pointer: str) -> None:
    response = api.get("/v1/jobs", params=query)
    assert response.status_code == 422
    assert response.headers["Content-Type"] == "application/problem+json"
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]


def test_positions_follow_priority_then_age(api: TestClient, db: Database) -> None:
    first, second = submit(api)["id"], submit(api)["id"]
    urgent = submit(api, queue__priority=90)["id"]
    positions = {item["id"]: item["queue"]["position"] for item in api.get("/v1/jobs").json()["items"]}
    assert positions == {urgent: 1, first: 2, second: 3}
    assert api.get(f"/v1/jobs/{first}").json()["queue"]["reason"] == "CLUSTER_UNREACHABLE"
    api.post(f"/v1/jobs/{urgent}/cancel")
    assert api.get(f"/v1/jobs/{urgent}").json()["queue"] is None
    assert api.get(f"/v1/jobs/{first}").json()["queue"]["position"] == 1


@pytest.mark.parametrize("job_id", ["job_01JD3Q8Z6M0000000000000000", "nonsense", "job_%00", "..%2f..%2fetc"])
def test_an_unknown_job_is_not_found(api: TestClient, job_id: str) -> None:
    for path in (
        "",
        "/attempts",
        "/events",
        "/events/stream",
        "/metrics",
        "/logs",
        "/checkpoints",
        "/exports",
        "/report",
    ):
        response = api.get(f"/v1/jobs/{job_id}{path}")
        assert response.status_code == 404, path
        assert response.json()["code"] == "not_found"


@pytest.mark.db
def test_cancel_is_asked_for_once_and_only_the_reconciler_moves_the_state(api: TestClient, db: Database) -> None:
    job_id = submit(api)["id"]
    first = api.post(f"/v1/jobs/{job_id}/cancel")
    again = api.post(f"/v1/jobs/{job_id}/cancel")
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["state"] == "QUEUED"
    assert first.json()["desired"] == "stop"
    assert again.json()["etag"] == first.json()["etag"] == first.headers["ETag"]
    types = [event["type"] for event in api.get(f"/v1/jobs/{job_id}/events").json()["items"]]
    assert types == ["job.queued", "job.cancel_requested"]
    with db.reader() as session:
        assert session.get_one(JobRow, job_id).next_look_at is not None


def test_a_job_that_ended_cannot_be_cancelled_and_says_what_can_be_done(api: TestClient, db: Database) -> None:
    job_id = submit(api)["id"]
    move(db, job_id, JobState.FAILED, reason="NAN_LOSS")
    response = api.post(f"/v1/jobs/{job_id}/cancel")
    assert response.status_code == 409
    problem = response.json()
    assert (problem["code"], problem["state"], problem["allowed_actions"]) == ("wrong_state", "FAILED", ["retry"])
    assert "optim.lr" in api.get(f"/v1/jobs/{job_id}").json()["advice"]


def test_if_match_guards_against_a_job_that_has_changed(api: TestClient) -> None:
    job = submit(api)
    stale = api.post(f"/v1/jobs/{job['id']}/pause", headers={"If-Match": '"99"'})
    assert stale.status_code == 412
    good = api.post(f"/v1/jobs/{job['id']}/pause", headers={"If-Match": job["etag"]})
    assert good.status_code == 202
    assert good.json()["etag"] != job["etag"]


def test_pause_and_resume_write_what_is_desired(api: TestClient, db: Database) -> None:
    job_id = submit(api)["id"]
    assert api.post(f"/v1/jobs/{job_id}/resume").status_code == 409
    assert api.post(f"/v1/jobs/{job_id}/pause").json()["desired"] == "pause"
    move(db, job_id, JobState.PAUSED)
    assert api.get(f"/v1/jobs/{job_id}").json()["allowed_actions"] == ["cancel", "resume"]
    key = {"Idempotency-Key": "resume-1"}
    assert api.post(f"/v1/jobs/{job_id}/resume", headers=key).json()["desired"] == "run"
    # Whose answer was lost asks again, and hears how the job is; whoever else asks is told that it is not paused.
    again = api.post(f"/v1/jobs/{job_id}/resume", headers=key)
    assert (again.status_code, again.json()["desired"]) == (202, "run")
    assert api.post(f"/v1/jobs/{job_id}/resume").status_code == 409
    # The same key does not resume what was paused since.
    assert api.post(f"/v1/jobs/{job_id}/pause").status_code == 202
    assert api.post(f"/v1/jobs/{job_id}/resume", headers=key).json()["desired"] == "pause"
    other = submit(api)["id"]
    assert api.post(f"/v1/jobs/{other}/resume", headers=key).json()["code"] == "idempotency_key_reused"


@pytest.mark.db
def test_retry_copies_the_job_and_continues_from_its_last_checkpoint(api: TestClient, db: Database) -> None:
    old = submit(api, labels={"a": "b"})
    add_checkpoint(db, old["id"], step=40)
    latest = add_checkpoint(db, old["id"], step=60)
    add_checkpoint(db, old["id"], step=80, valid=False)
    assert api.post(f"/v1/jobs/{old['id']}/retry").status_code == 409
    move(db, old["id"], JobState.FAILED, reason="NODE_LOST")

    response = api.post(f"/v1/jobs/{old['id']}/retry")
    assert response.status_code == 201
    new = response.json()
    assert response.headers["Location"] == f"/v1/jobs/{new['id']}"
    assert (new["retry_of"], new["resume_from"], new["state"]) == (old["id"], latest, "QUEUED")
    for field in ("spec", "spec_hash", "training_fingerprint", "labels", "plan"):
        assert new[field] == old[field]
    scratch = api.post(f"/v1/jobs/{old['id']}/retry?resume=false").json()
    assert scratch["resume_from"] is None
    events = [event["type"] for event in api.get(f"/v1/jobs/{old['id']}/events").json()["items"]]
    assert events == ["job.queued", "job.failed", "job.retried", "job.retried"]


def test_a_retry_of_a_retry_that_left_nothing_goes_on_from_the_first_ones_checkpoint(
    api: TestClient, db: Database
) -> None:
    old = submit(api)
    latest = add_checkpoint(db, old["id"], step=60)
    move(db, old["id"], JobState.FAILED, reason="NODE_LOST")
    second = api.post(f"/v1/jobs/{old['id']}/retry").json()
    move(db, second["id"], JobState.FAILED, reason="NODE_LOST")
    third = api.post(f"/v1/jobs/{second['id']}/retry").json()
    assert (third["retry_of"], third["resume_from"], third["progress"]["step"]) == (second["id"], latest, 60)


# -- Idempotency-Key ---------------------------------------------------------------------------------------------------
@pytest.mark.db
def test_a_repeated_key_replays_the_first_answer(api: TestClient, db: Database) -> None:
    headers = {"Idempotency-Key": "once"}
    first = api.post("/v1/jobs", json={"spec": spec_with()}, headers=headers)
    move(db, first.json()["id"], JobState.PREPARING)
    again = api.post("/v1/jobs", json={"spec": spec_with()}, headers=headers)
    assert again.status_code == 201
    assert again.content == first.content
    assert again.headers["Location"] == first.headers["Location"]
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert num_jobs(db) == 1


def test_a_key_used_for_another_body_is_refused(api: TestClient, db: Database) -> None:
    headers = {"Idempotency-Key": "once"}
    assert api.post("/v1/jobs", json={"spec": spec_with()}, headers=headers).status_code == 201
    other = api.post("/v1/jobs", json={"spec": spec_with(train__seed=1)}, headers=headers)
    assert other.status_code == 409
    assert other.json()["code"] == "idempotency_key_reused"
    assert num_jobs(db) == 1


@pytest.mark.db
def test_what_a_key_was_used_for_is_said_before_what_is_wrong_with_another_body(api: TestClient, db: Database) -> None:
    headers = {"Idempotency-Key": "once"}
    assert api.post("/v1/jobs", json={"spec": spec_with()}, headers=headers).status_code == 201
    for wrong in (spec_with(train__seed=-1), spec_with(train__global_batch_size=10**6)):
        assert api.post("/v1/jobs", json={"spec": wrong}, headers=headers).status_code == 409
        assert api.post("/v1/jobs", json={"spec": wrong}).status_code == 422
    assert num_jobs(db) == 1


def test_keys_belong_to_a_token_and_end_after_a_day(api: TestClient, db: Database) -> None:
    headers = {"Idempotency-Key": "once"}
    body = {"spec": spec_with()}
    ids = {api.post("/v1/jobs", json=body, headers=headers).json()["id"]}
    ids.add(api.post("/v1/jobs", json=body, headers=headers | headers_for(db, "member")).json()["id"])
    with db.session() as session:
        session.execute(update(IdempotencyRow).values(created_at=datetime.now(UTC) - timedelta(hours=25)))
    ids.add(api.post("/v1/jobs", json=body, headers=headers).json()["id"])
    assert len(ids) == 3


def test_a_refused_submission_does_not_use_up_its_key(api: TestClient) -> None:
    headers = {"Idempotency-Key": "once"}
    assert api.post("/v1/jobs", json={"spec": spec_with(train__seed=-1)}, headers=headers).status_code == 422
    assert api.post("/v1/jobs", json={"spec": spec_with()}, headers=headers).status_code == 201


@pytest.mark.db
def test_of_many_equal_submissions_at_once_one_makes_a_job(api: TestClient, db: Database) -> None:
    body = json.dumps({"spec": spec_with()})

    def post(_: int) -> Any:
        return api.post(
            "/v1/jobs", content=body, headers={"Idempotency-Key": "race", "Content-Type": "application/json"}
        )

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(post, range(6)))
    assert [answer.status_code for answer in answers] == [201] * 6
    assert len({answer.content for answer in answers}) == 1
    assert num_jobs(db) == 1
    with db.reader() as session:
        assert session.scalar(select(func.count()).select_from(EventRow)) == 1


# -- what a running job shows ------------------------------------------------------------------------------------------
def test_a_running_job_shows_progress_eta_and_attempts(api: TestClient, db: Database) -> None:
    job_id = submit(api)["id"]
    add_attempt(
        db,
        job_id,
        from_step=20,
        to_step=31,
        first_step_at=T0,
        last_progress_at=T0 + timedelta(seconds=5),
        ranks={"10": _heartbeat(10), "2": _heartbeat(2)},
    )
    move(db, job_id, JobState.PREPARING, JobState.RUNNING)
    with db.session() as session:
        session.get_one(JobRow, job_id).step = 31
    job = api.get(f"/v1/jobs/{job_id}").json()
    assert job["queue"] is None
    # 10 steps in 5 s, 69 steps left.
    assert job["progress"] == {"step": 31, "total_steps": 100, "pct": 31.0, "eta_s": 34.5}
    assert [rank["rank"] for rank in job["attempts"][0]["ranks"]] == [2, 10]
    assert api.get(f"/v1/jobs/{job_id}/attempts").json() == job["attempts"]


def _heartbeat(rank: int) -> dict[str, Any]:
    return {"rank": rank, "node": "n", "pid": 1, "phase": "training", "step": 31, "at": T0.isoformat()}
