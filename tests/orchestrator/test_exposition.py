"""What Prometheus is told: the service from the database, requests by route and never by what a client makes up."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from configs.states import AttemptState, JobState
from orchestrator.storage.db import Database
from orchestrator.storage.tables import ClusterRow, JobRow
from tests.orchestrator.conftest import headers_for
from tests.orchestrator.rows import T0, add_attempt, move, submit

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(api: TestClient) -> Samples:
    response = api.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


@pytest.mark.db
def test_an_empty_service_is_all_zeros(api: TestClient) -> None:
    found = scrape(api)
    assert {labels[0][1] for name, labels in found if name == "patchwork_jobs"} == {state.value for state in JobState}
    ours = {key: number for key, number in found.items() if key[0].startswith("patchwork_") and "http" not in key[0]}
    assert set(ours.values()) == {0.0}


@pytest.mark.db
def test_jobs_queue_attempts_and_loss_are_counted(api: TestClient, db: Database) -> None:
    first, second, third = (str(submit(api)["id"]) for _ in range(3))
    add_attempt(db, first, 1, state=AttemptState.ENDED, exit_reason="NODE_LOST")
    add_attempt(db, first, 2)
    move(db, first, JobState.PREPARING, JobState.RUNNING)
    with db.session() as session:
        session.get_one(JobRow, first).wasted_steps = 20
        session.get_one(JobRow, first).gpu_seconds = 120.5
        session.get_one(JobRow, first).wasted_gpu_s = 12.25
        session.get_one(JobRow, second).state_since = T0
        nodes = [{"id": "a", "alive": True, "gpus": 8.0}, {"id": "b", "alive": False, "gpus": 8.0}]
        at = T0 + timedelta(seconds=1)
        session.add(ClusterRow(id=1, cluster_id="c", reachable=True, nodes=nodes, seen_at=T0, controller_at=at))
    api.post(f"/v1/jobs/{third}/cancel")
    found = scrape(api)
    assert value(found, "patchwork_jobs", state="RUNNING") == 1
    assert value(found, "patchwork_jobs", state="QUEUED") == 2
    # The third one is to be cancelled: it does not wait for its turn.
    assert value(found, "patchwork_queue_length") == 1
    assert value(found, "patchwork_queue_oldest_seconds") > 1000
    assert value(found, "patchwork_attempts", state="RUNNING") == 1
    assert value(found, "patchwork_attempts_ended_total", reason="NODE_LOST") == 1
    assert value(found, "patchwork_wasted_steps_total") == 20
    assert value(found, "patchwork_device_seconds_total") == 120.5
    assert value(found, "patchwork_wasted_device_seconds_total") == 12.25
    assert value(found, "patchwork_cluster_reachable") == 1
    assert value(found, "patchwork_cluster_nodes") == 1
    assert value(found, "patchwork_cluster_gpus") == 8
    assert value(found, "patchwork_controller_last_loop_timestamp_seconds") == T0.timestamp() + 1


def test_requests_are_counted_by_route(api: TestClient) -> None:
    job_id = str(submit(api)["id"])
    for _ in range(3):
        api.get(f"/v1/jobs/{job_id}")
    api.get("/v1/jobs/job_01ARZ3NDEKTSV4RRFFQ69G5FAV")
    found = scrape(api)
    count = "patchwork_http_request_duration_seconds_count"
    assert value(found, count, method="GET", route="/v1/jobs/{job_id}", status="200") == 3
    assert value(found, count, method="GET", route="/v1/jobs/{job_id}", status="404") == 1
    assert value(found, count, method="POST", route="/v1/jobs", status="201") == 1


def test_what_clients_make_up_is_no_label(api: TestClient) -> None:
    for number in range(5):
        api.get(f"/made/up/{number}")
        api.request(f"METHOD{number}", "/v1/jobs")
    text = api.get("/metrics").text
    assert "made/up" not in text
    assert "METHOD" not in text
    assert 'route="unmatched",status="404"' in text


def test_it_needs_a_token_and_a_viewer_will_do(anonymous: TestClient, db: Database) -> None:
    assert anonymous.get("/metrics").status_code == 401
    assert anonymous.get("/metrics", headers=headers_for(db, "viewer")).status_code == 200


def test_every_metric_is_documented(api: TestClient) -> None:
    page = (Path(__file__).parents[2] / "docs" / "production.md").read_text()
    documented = set(re.findall(r"`(patchwork_\w+)", page))
    told = set(re.findall(r"^# TYPE (patchwork_\w+) ", api.get("/metrics").text, re.MULTILINE))
    assert told == documented
