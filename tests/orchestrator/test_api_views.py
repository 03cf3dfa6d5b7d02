"""What the dashboard's pages stand on: edits, forks, jobs side by side, the service at a glance, ordered lists."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from configs.states import AttemptState, JobState
from orchestrator.services.compare import differences
from orchestrator.services.lineage import read_lineage
from orchestrator.storage.db import Database
from orchestrator.storage.tables import CheckpointRow, ClusterRow, JobRow, MetricRow
from tests.orchestrator.conftest import headers_for
from tests.orchestrator.rows import T0, add_attempt, add_checkpoint, move, spec_with, submit


# -- edits -------------------------------------------------------------------------------------------------------------
@pytest.mark.db
def test_priority_and_labels_are_changed_by_whoever_has_seen_the_job_as_it_is(api: TestClient, db: Database) -> None:
    job = submit(api)
    body = {"priority": 90, "labels": {"team": "vision"}}
    edited = api.patch(f"/v1/jobs/{job['id']}", json=body, headers={"If-Match": job["etag"]})
    assert edited.status_code == 200, edited.text
    assert (edited.json()["priority"], edited.json()["labels"]) == (90, {"team": "vision"})
    assert edited.headers["etag"] == edited.json()["etag"] != job["etag"]
    stale = api.patch(f"/v1/jobs/{job['id']}", json={"priority": 1}, headers={"If-Match": job["etag"]})
    assert stale.status_code == 412
    events = api.get(f"/v1/jobs/{job['id']}/events").json()["items"]
    assert [e["message"] for e in events if e["type"] == "job.edited"] == ["Changed: priority 50 to 90, labels"]
    assert edited.json()["spec"]["queue"]["priority"] == 50, "what was asked for never changes"


def test_what_is_so_already_is_no_change(api: TestClient) -> None:
    job = submit(api)
    same = api.patch(f"/v1/jobs/{job['id']}", json={"priority": 50, "labels": job["labels"]}).json()
    assert same["etag"] == job["etag"]


def test_the_queue_follows_an_edited_priority(api: TestClient, db: Database) -> None:
    first, second = submit(api, name="first"), submit(api, name="second")
    api.patch(f"/v1/jobs/{second['id']}", json={"priority": 99})
    queued = api.get("/v1/overview").json()["queued"]
    assert [job["id"] for job in queued] == [second["id"], first["id"]]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [({}, ""), ({"priority": 101}, "/priority"), ({"labels": {"": "x"}}, "/labels"), ({"name": "x"}, "/name")],
)
def test_an_edit_that_cannot_be_says_what_is_wrong(api: TestClient, body: dict[str, Any], pointer: str) -> None:
    answer = api.patch(f"/v1/jobs/{submit(api)['id']}", json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].startswith(pointer)


def test_of_an_ended_job_only_labels_change_and_only_members_change_them(api: TestClient, db: Database) -> None:
    job = submit(api)
    move(db, job["id"], JobState.CANCELLED)
    assert api.patch(f"/v1/jobs/{job['id']}", json={"priority": 1}).status_code == 409
    assert api.patch(f"/v1/jobs/{job['id']}", json={"labels": {"a": "b"}}).status_code == 200
    viewer = headers_for(db, "viewer")
    assert api.patch(f"/v1/jobs/{job['id']}", json={"labels": {}}, headers=viewer).status_code == 403
    assert api.patch("/v1/jobs/job_nothing", json={"priority": 1}).status_code == 404


# -- forks -------------------------------------------------------------------------------------------------------------
@pytest.mark.db
def test_a_fork_goes_on_from_a_checkpoint_with_other_workers(api: TestClient, db: Database) -> None:
    job = submit(api)
    add_attempt(db, job["id"])
    earlier, latest = add_checkpoint(db, job["id"], 20), add_checkpoint(db, job["id"], 40)
    body = {"checkpoint": "latest", "overrides": {"resources.workers": 1}, "name": "narrower"}
    made = api.post(f"/v1/jobs/{job['id']}/fork", json=body)
    assert made.status_code == 201, made.text
    fork = made.json()
    assert (fork["name"], fork["resume_from"], fork["progress"]["step"]) == ("narrower", latest, 40)
    assert fork["spec"]["resources"]["workers"] == 1
    assert fork["training_fingerprint"] == job["training_fingerprint"]
    assert fork["retry_of"] is None
    named = api.post(f"/v1/jobs/{job['id']}/fork", json={"checkpoint": earlier}).json()
    assert (named["resume_from"], named["name"]) == (earlier, "small")
    told = [e["data"] for e in api.get(f"/v1/jobs/{job['id']}/events").json()["items"] if e["type"] == "job.forked"]
    assert told == [{"job_id": f["id"], "checkpoint": f["resume_from"]} for f in (fork, named)]
    origin = [e for e in api.get(f"/v1/jobs/{fork['id']}/events").json()["items"] if e["type"] == "job.forked_from"]
    assert origin[0]["data"]["job_id"] == job["id"]


def test_a_fork_that_learns_otherwise_starts_anew_or_not_at_all(api: TestClient, db: Database) -> None:
    job = submit(api)
    add_attempt(db, job["id"])
    add_checkpoint(db, job["id"], 20)
    changes = {"optim.lr": 0.5}
    refused = api.post(f"/v1/jobs/{job['id']}/fork", json={"checkpoint": "best", "overrides": changes})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "/checkpoint"
    assert "optim" in refused.json()["detail"]
    anew = api.post(f"/v1/jobs/{job['id']}/fork", json={"overrides": changes}).json()
    assert (anew["spec"]["optim"]["lr"], anew["resume_from"], anew["progress"]["step"]) == (0.5, None, 0)


def test_a_fork_keeps_earlier_overrides_and_is_made_once(api: TestClient) -> None:
    job = submit(api, train__seed=3)
    once = api.post(f"/v1/jobs/{job['id']}/fork", json={"overrides": {"optim.lr": 0.5}}).json()
    again = {"Idempotency-Key": "one"}
    first = api.post(f"/v1/jobs/{once['id']}/fork", json={"overrides": {"train.seed": 4}}, headers=again)
    second = api.post(f"/v1/jobs/{once['id']}/fork", json={"overrides": {"train.seed": 4}}, headers=again)
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["idempotent-replayed"] == "true"
    assert (first.json()["spec"]["optim"]["lr"], first.json()["spec"]["train"]["seed"]) == (0.5, 4)


@pytest.mark.parametrize("wanted", ["latest", "ckpt_01JD3Q8Z6M0000000000000000_s000000020_a0001", "nonsense"])
def test_a_checkpoint_that_is_not_there_is_named(api: TestClient, wanted: str) -> None:
    answer = api.post(f"/v1/jobs/{submit(api)['id']}/fork", json={"checkpoint": wanted})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["value"] == wanted


def test_a_fork_has_its_own_name_where_the_old_one_was_an_override(api: TestClient) -> None:
    first = api.post("/v1/jobs", json={"spec": spec_with(), "overrides": {"name": "by the form"}}).json()
    made = api.post(f"/v1/jobs/{first['id']}/fork", json={"name": "its own"}).json()
    assert (first["name"], made["name"]) == ("by the form", "its own")


def test_a_fork_does_not_take_the_checkpoint_of_another_job(api: TestClient, db: Database) -> None:
    one, other = submit(api), submit(api)
    add_attempt(db, other["id"])
    theirs = add_checkpoint(db, other["id"], 20)
    assert api.post(f"/v1/jobs/{one['id']}/fork", json={"checkpoint": theirs}).status_code == 422


# -- side by side ------------------------------------------------------------------------------------------------------
def add_points(db: Database, job_id: str, name: str, values: dict[int, float | None], attempt: int = 1) -> None:
    with db.session() as session:
        session.add_all(
            MetricRow(job_id=job_id, name=name, step=s, attempt=attempt, value=v, at=T0 + timedelta(seconds=s))
            for s, v in values.items()
        )
        session.get_one(JobRow, job_id).started_at = T0


@pytest.mark.db
def test_jobs_are_compared_over_steps_and_time(api: TestClient, db: Database) -> None:
    one, other = submit(api, name="one"), submit(api, name="other", optim__lr=0.5)
    for job in (one, other):
        add_attempt(db, job["id"])
    add_points(db, one["id"], "train/loss", {s: 10.0 - s for s in range(1, 9)})
    add_points(db, other["id"], "train/loss", {2: 5.0, 4: None})
    add_points(db, other["id"], "train/lr", {2: 0.5})
    query = {"job": [other["id"], one["id"]], "name": ["train/loss", "nothing"], "max_points": 2}
    found = api.get("/v1/compare", params=query).json()
    assert [job["name"] for job in found["jobs"]] == ["other", "one"]
    assert found["names"] == ["train/loss", "train/lr"]
    theirs, ours = found["series"]
    assert (theirs["index"], theirs["steps"], theirs["values"], theirs["last"]) == (0, [2, 4], [5.0, None], None)
    assert (ours["index"], ours["steps"], ours["values"]) == (1, [4, 8], [7.5, 3.5])
    assert (ours["lows"], ours["highs"], ours["seconds"]) == ([6.0, 2.0], [9.0, 5.0], [4.0, 8.0])
    assert (ours["last"], ours["lowest"], ours["highest"]) == (2.0, 2.0, 9.0)
    assert [d["pointer"] for d in found["differences"]] == ["/name", "/optim/lr"]
    assert found["differences"][1]["values"] == [0.5, 0.001]


def test_a_compared_curve_is_cut_where_the_job_resumed(api: TestClient, db: Database) -> None:
    job = submit(api)
    add_attempt(db, job["id"], 1)
    add_attempt(db, job["id"], 2, from_step=4)
    add_points(db, job["id"], "train/loss", {2: 2.0, 4: 4.0, 6: 666.0})
    add_points(db, job["id"], "train/loss", {4: 44.0, 6: 6.0}, attempt=2)
    (series,) = api.get("/v1/compare", params={"job": job["id"], "name": "train/loss"}).json()["series"]
    assert (series["steps"], series["values"]) == ([2, 4, 6], [2.0, 44.0, 6.0])


@pytest.mark.db
def test_large_values_have_a_mean(api: TestClient, db: Database) -> None:
    job = submit(api)
    add_attempt(db, job["id"])
    add_points(db, job["id"], "train/loss", {1: 1.5e308, 2: 1.7e308})
    query = {"job": job["id"], "name": "train/loss", "max_points": 1}
    (series,) = api.get("/v1/compare", params=query).json()["series"]
    assert series["values"] == [pytest.approx(1.6e308)]


def test_what_cannot_be_compared_is_refused(api: TestClient) -> None:
    job = submit(api)["id"]
    assert api.get("/v1/compare", params={"job": [job, job]}).status_code == 422
    assert api.get("/v1/compare", params={"job": [job] * 21}).status_code == 422
    assert api.get("/v1/compare").status_code == 422
    assert api.get("/v1/compare", params={"job": "job_nothing"}).status_code == 404


def test_only_what_differs_is_a_difference() -> None:
    specs = [{"a": {"b": 1, "c": [1]}, "d~/": None}, {"a": {"b": 1, "c": [1, 2]}}, {"a": {"b": 1, "c": [1]}, "e": {}}]
    found = {d.pointer: d.values for d in differences(specs)}
    assert found == {"/a/c": ([1], [1, 2], [1]), "/d~0~1": (None, None, None), "/e": (None, None, {})}


# -- at a glance, and in order -----------------------------------------------------------------------------------------
@pytest.mark.db
def test_the_overview_counts_everything_and_lists_the_first(api: TestClient, db: Database) -> None:
    running, waiting, failed = (submit(api, name=name) for name in ("running", "waiting", "failed"))
    move(db, running["id"], JobState.PREPARING, JobState.RUNNING)
    add_attempt(db, running["id"], state=AttemptState.RUNNING, world_size=2)
    add_checkpoint(db, running["id"], 20)
    gone = add_checkpoint(db, running["id"], 10)
    move(db, failed["id"], JobState.FAILED, reason="OOM_GPU")
    with db.session() as session:
        session.get_one(CheckpointRow, gone).deleted_at = T0
        node = {"id": "n1", "alive": True, "cpus": 8.0, "gpus": 1.0}
        dead = {"id": "n2", "alive": False, "cpus": 99.0, "gpus": 99.0}
        session.add(ClusterRow(id=1, cluster_id="c", reachable=True, nodes=[node, dead], seen_at=T0))
    view = api.get("/v1/overview").json()
    assert {state: n for state, n in view["counts"].items() if n} == {"RUNNING": 1, "QUEUED": 1, "FAILED": 1}
    assert [job["id"] for job in view["active"]] == [running["id"]]
    assert [job["id"] for job in view["queued"]] == [waiting["id"]]
    assert [(job["id"], job["reason"]) for job in view["failed"]] == [(failed["id"], "OOM_GPU")]
    assert view["devices"] == {"cpus": 8.0, "gpus": 1.0, "cpus_used": 2.0, "gpus_used": 0.0}
    assert view["storage"] == {"num_checkpoints": 1, "num_bytes": 1000}


@pytest.mark.db
@pytest.mark.parametrize("sort", ["created", "-created", "name", "-name", "priority", "-priority"])
def test_jobs_are_listed_in_the_order_asked_for_page_by_page(api: TestClient, sort: str) -> None:
    made = [submit(api, name=name, queue__priority=p) for name, p in (("b", 1), ("a", 5), ("c", 5), ("a", 3))]
    keys = {"created": "created_at", "name": "name", "priority": "priority"}
    key = keys[sort.removeprefix("-")]
    expected = sorted(made, key=lambda job: (job[key], job["id"]), reverse=sort.startswith("-"))
    found, cursor = [], None
    while True:
        page = api.get(
            "/v1/jobs", params={"sort": sort, "limit": 2, "count": True} | ({"cursor": cursor} if cursor else {})
        )
        assert page.json()["num_matching"] == 4
        found += [job["id"] for job in page.json()["items"]]
        cursor = page.json()["next_cursor"]
        if cursor is None:
            break
    assert found == [job["id"] for job in expected]


def test_a_cursor_is_good_for_its_own_order_only(api: TestClient) -> None:
    for name in ("a", "b"):
        submit(api, name=name)
    cursor = api.get("/v1/jobs?sort=name&limit=1").json()["next_cursor"]
    assert api.get("/v1/jobs", params={"sort": "name", "cursor": cursor}).status_code == 200
    assert api.get("/v1/jobs", params={"cursor": cursor}).status_code == 422
    assert api.get("/v1/jobs?sort=reason").status_code == 422
    assert api.get("/v1/jobs?limit=1").json()["num_matching"] is None


def test_the_document_knows_the_new_routes(api: TestClient) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert {"/v1/overview", "/v1/compare", "/v1/jobs/{job_id}/fork"} <= set(paths)
    assert "patch" in paths["/v1/jobs/{job_id}"]
    assert not [path for path in paths if path.startswith("/dashboard")]


# -- lineage -----------------------------------------------------------------------------------------------------------
@pytest.mark.db
def test_a_family_of_jobs_is_found_from_any_of_them(api: TestClient, db: Database) -> None:
    first = submit(api, name="first")["id"]
    add_attempt(db, first, 1, to_step=40)
    checkpoint = add_checkpoint(db, first, 40)
    fork = api.post(f"/v1/jobs/{first}/fork", json={"checkpoint": checkpoint, "name": "forked"}).json()["id"]
    exported = {"kind": "export", "init_from": checkpoint, "resources": {"gpus_per_worker": 0}}
    export = api.post("/v1/jobs", json={"spec": exported}).json()["id"]
    move(db, first, JobState.CANCELLED)
    retry = api.post(f"/v1/jobs/{first}/retry").json()["id"]
    submit(api, name="a stranger")

    views = [api.get(f"/v1/jobs/{job_id}/lineage").json() for job_id in (first, fork, export, retry)]
    for view in views:
        assert [job["id"] for job in view["jobs"]] == [first, fork, export, retry]
        links = {(link["source"], link["target"]): (link["how"], link["checkpoint"]) for link in view["links"]}
        assert links == {
            (first, fork): ("fork", checkpoint),
            (first, export): ("weights", checkpoint),
            (first, retry): ("retry", checkpoint),
        }
        assert view["complete"] is True
    assert api.get(f"/v1/jobs/{first[:-1]}Z/lineage").status_code == 404


def test_of_a_large_family_the_nearest_are_shown(api: TestClient, db: Database) -> None:
    job_id = submit(api, name="first")["id"]
    for number in range(4):
        job_id = api.post(f"/v1/jobs/{job_id}/fork", json={"name": f"fork {number}"}).json()["id"]
    with db.session() as session:
        rows = list(session.scalars(select(JobRow).order_by(JobRow.created_at)))
        for older, newer in itertools.pairwise(rows):
            newer.retry_of = older.id
        middle = rows[2].id
    assert [job.name for job in read_lineage(db, middle, 3).jobs] == ["fork 0", "fork 1", "fork 2"]
    assert read_lineage(db, middle, 3).complete is False
    assert read_lineage(db, middle).complete is True
