"""Drivers' claims and reports: once, in order, fenced, and never a change of state."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select
from starlette.testclient import TestClient

from configs.states import AttemptState, Desired, JobState
from configs.wire import ClaimRequest, Heartbeat, MetricPoint, ReportBatch, WorkerEvent
from orchestrator.api.middleware import MAX_REPORT_BYTES
from orchestrator.storage.db import Database
from orchestrator.storage.tables import AttemptRow, EventRow, JobRow, MetricRow
from tests.orchestrator.rows import T0, add_attempt, move, submit

Headers = dict[str, str]


@pytest.fixture
def job_id(api: TestClient) -> str:
    return str(submit(api)["id"])


@pytest.fixture
def attempt(job_id: str, db: Database) -> str:
    return add_attempt(db, job_id, state=AttemptState.STARTING)


def claim(api: TestClient, driver: Headers, attempt: str, nonce: str = "first-nonce") -> Any:
    request = ClaimRequest(nonce=nonce, node="node-1", pid=7)
    path = f"/internal/v1/attempts/{attempt}/claim"
    return api.post(path, content=request.model_dump_json(), headers=driver)


def report(api: TestClient, driver: Headers, attempt: str, batch: ReportBatch) -> Any:
    path = f"/internal/v1/attempts/{attempt}/reports"
    return api.post(path, content=batch.model_dump_json(), headers=driver)


def heartbeat(rank: int, step: int, phase: str = "training", at: datetime = T0) -> Heartbeat:
    return Heartbeat.model_validate(
        {"rank": rank, "node": f"node-{rank}", "pid": 1, "phase": phase, "step": step, "at": at}
    )


def point(step: int, value: float | None, name: str = "train/loss") -> MetricPoint:
    return MetricPoint(name=name, step=step, value=value, at=T0)


def attempt_row(db: Database, attempt: str) -> AttemptRow:
    with db.reader() as session:
        return session.get_one(AttemptRow, attempt)


@pytest.mark.db
def test_one_driver_claims_an_attempt_and_may_claim_again(
    api: TestClient, driver: Headers, attempt: str, db: Database
) -> None:
    assert claim(api, driver, attempt).json() == {"attempt_id": attempt, "desired": "run"}
    assert claim(api, driver, attempt).status_code == 200
    other = claim(api, driver, attempt, "another-nonce")
    assert other.status_code == 409
    assert other.json()["code"] == "attempt_fenced"
    with db.reader() as session:
        claims = session.scalars(select(EventRow).where(EventRow.type == "attempt.claimed"))
        assert [event.attempt for event in claims] == [1]


@pytest.mark.parametrize("nonce", ["", "short", "x" * 65])
def test_a_nonce_that_is_none_is_refused(api: TestClient, driver: Headers, attempt: str, nonce: str) -> None:
    assert claim(api, driver, attempt, nonce).status_code == 422


def test_an_ended_superseded_or_unknown_attempt_cannot_be_claimed(
    api: TestClient, driver: Headers, job_id: str, attempt: str, db: Database
) -> None:
    second = add_attempt(db, job_id, 2)
    assert claim(api, driver, attempt).status_code == 409
    assert claim(api, driver, second).status_code == 200
    move(db, job_id, JobState.FAILED)
    assert claim(api, driver, second).status_code == 409
    for unknown in ("att_01JD3Q8Z6M0000000000000000_0001", "nonsense", "att_x_0001"):
        assert claim(api, driver, unknown).status_code == 404


@pytest.mark.db
def test_a_report_notes_where_every_rank_is(
    api: TestClient, driver: Headers, job_id: str, attempt: str, db: Database
) -> None:
    batch = ReportBatch(seq=1, total_steps=100, heartbeats=(heartbeat(0, 0, "building"), heartbeat(1, 0, "building")))
    reply = report(api, driver, attempt, batch)
    assert reply.json() == {"desired": "run", "acknowledged_seq": 1}
    row = attempt_row(db, attempt)
    assert (row.phase, row.to_step, row.first_step_at) == ("building", 0, None)
    assert row.last_progress_at == row.last_report_at
    assert row.nodes == ["node-0", "node-1"]

    later = T0 + timedelta(seconds=9)
    report(api, driver, attempt, ReportBatch(seq=2, heartbeats=(heartbeat(0, 3, at=later), heartbeat(1, 4, at=later))))
    row = attempt_row(db, attempt)
    assert (row.phase, row.to_step, row.first_step_at) == ("training", 4, later)
    assert row.last_progress_at == row.last_report_at
    assert {rank: beat["step"] for rank, beat in row.ranks.items()} == {"0": 3, "1": 4}
    job = api.get(f"/v1/jobs/{job_id}").json()
    assert job["progress"]["step"] == 4
    assert job["state"] == "QUEUED", "reports never write the state"


def test_standing_still_is_no_progress(api: TestClient, driver: Headers, attempt: str, db: Database) -> None:
    report(api, driver, attempt, ReportBatch(seq=1, heartbeats=(heartbeat(0, 5),)))
    later = T0 + timedelta(seconds=50)
    report(api, driver, attempt, ReportBatch(seq=2, heartbeats=(heartbeat(0, 5, at=later),)))
    row = attempt_row(db, attempt)
    assert row.last_progress_at is not None
    assert row.last_report_at is not None
    assert row.last_report_at > row.last_progress_at


@pytest.mark.parametrize("skew", [timedelta(hours=-1), timedelta(hours=1)])
def test_a_nodes_wrong_clock_makes_no_hang_and_no_impossible_time(
    api: TestClient, driver: Headers, job_id: str, db: Database, skew: timedelta
) -> None:
    created = datetime.now(UTC)
    attempt = add_attempt(db, job_id, created_at=created)
    report(api, driver, attempt, ReportBatch(seq=1, heartbeats=(heartbeat(0, 5, at=created + skew),)))
    row = attempt_row(db, attempt)
    assert row.last_progress_at == row.last_report_at
    assert row.first_step_at is not None
    assert created <= row.first_step_at <= datetime.now(UTC)


@pytest.mark.db
def test_a_repeated_batch_changes_nothing(
    api: TestClient, driver: Headers, job_id: str, attempt: str, db: Database
) -> None:
    event = WorkerEvent(type="image.corrupt", message="a.jpg\x00 was replaced", at=T0, data={"path": "a.jpg"})
    batch = ReportBatch(
        seq=3,
        heartbeats=(heartbeat(0, 5),),
        metrics=(point(5, 0.5), point(4, 0.7), point(5, None, "train/grad_norm")),
        events=(event,),
        checkpoints=("ckpt_x",),
    )
    assert report(api, driver, attempt, batch).json()["acknowledged_seq"] == 3
    before = _everything(db)
    assert report(api, driver, attempt, batch).json()["acknowledged_seq"] == 3
    changed = batch.model_copy(update={"seq": 2, "metrics": (point(5, 9.9),)})
    assert report(api, driver, attempt, changed).json()["acknowledged_seq"] == 3
    assert _everything(db) == before
    job = api.get(f"/v1/jobs/{job_id}").json()
    assert job["last_metrics"] == {"train/loss": 0.5, "train/grad_norm": None}
    events = api.get(f"/v1/jobs/{job_id}/events").json()["items"][1:]
    assert [(e["type"], e["message"], e["attempt"]) for e in events] == [
        ("image.corrupt", "a.jpg was replaced", 1),
        ("checkpoint.committed", "Checkpoint ckpt_x was committed", 1),
    ]


@pytest.mark.db
def test_numbers_that_json_cannot_hold_do_not_block_the_reports(
    api: TestClient, driver: Headers, job_id: str, attempt: str
) -> None:
    body = (
        '{"seq": 1, "events": [{"type": "step.skipped", "message": "m", "at": "2026-01-01T00:00:00Z",'
        ' "data": {"loss": NaN, "norms": [1.0, Infinity]}}]}'
    )
    assert api.post(f"/internal/v1/attempts/{attempt}/reports", content=body, headers=driver).status_code == 200
    event = api.get(f"/v1/jobs/{job_id}/events").json()["items"][-1]
    assert event["data"] == {"loss": None, "norms": [1.0, None]}


def _everything(db: Database) -> Any:
    with db.reader() as session:
        metrics = [(m.name, m.step, m.attempt, m.value) for m in session.scalars(select(MetricRow))]
        return metrics, session.scalar(select(func.count()).select_from(EventRow))


@pytest.mark.db
def test_twenty_thousand_points_in_one_batch(
    api: TestClient, driver: Headers, job_id: str, attempt: str, db: Database
) -> None:
    metrics = tuple(point(step, step / 7, name) for step in range(5000) for name in ("a", "b", "c", "d"))
    batch = ReportBatch(seq=1, metrics=metrics)
    assert report(api, driver, attempt, batch).status_code == 200
    with db.reader() as session:
        assert session.scalar(select(func.count()).select_from(MetricRow)) == 20_000
    over = ReportBatch.model_construct(seq=2, metrics=(*metrics, point(1, 1.0)))
    assert report(api, driver, attempt, over).status_code == 422


def test_a_report_over_its_limit_is_refused(api: TestClient, driver: Headers, attempt: str) -> None:
    path = f"/internal/v1/attempts/{attempt}/reports"
    response = api.post(path, content=b" " * (MAX_REPORT_BYTES + 1), headers=driver)
    assert response.status_code == 413


def test_a_name_that_is_no_metric_is_refused(api: TestClient, driver: Headers, attempt: str) -> None:
    path = f"/internal/v1/attempts/{attempt}/reports"
    body = {"seq": 1, "metrics": [{"name": "<b>", "step": 1, "value": 1, "at": T0.isoformat()}]}
    response = api.post(path, json=body, headers=driver)
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "/metrics/0/name"


@pytest.mark.db
@pytest.mark.parametrize(
    ("pointer", "body"),
    [
        ("/seq", {"seq": 2**63}),
        ("/total_steps", {"seq": 1, "total_steps": -1}),
        (
            "/metrics/0/step",
            {"seq": 1, "metrics": [{"name": "a", "step": 10**30, "value": 1, "at": "2026-01-01T00:00:00Z"}]},
        ),
        (
            "/metrics/0/at",
            {"seq": 1, "metrics": [{"name": "a", "step": 1, "value": 1, "at": "0001-01-01T00:00:00+23:00"}]},
        ),
        ("/events/0/type", {"seq": 1, "events": [{"type": "a\0", "message": "", "at": "2026-01-01T00:00:00Z"}]}),
        ("/checkpoints/0", {"seq": 1, "checkpoints": ["ckpt_\0"]}),
    ],
)
def test_what_no_database_holds_is_refused(
    api: TestClient, driver: Headers, attempt: str, pointer: str, body: dict[str, Any]
) -> None:
    response = api.post(f"/internal/v1/attempts/{attempt}/reports", json=body, headers=driver)
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, pointer)


@pytest.mark.db
@pytest.mark.parametrize("field", ["nonce", "node", "cluster_id"])
def test_a_claim_with_a_nul_is_refused(api: TestClient, driver: Headers, attempt: str, field: str) -> None:
    body = {"nonce": "first-nonce", "node": "node-1", "pid": 7, field: "with-a-\0-inside"}
    response = api.post(f"/internal/v1/attempts/{attempt}/claim", json=body, headers=driver)
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, f"/{field}")


@pytest.mark.parametrize("desired", list(Desired))
def test_the_reply_carries_the_order(
    api: TestClient, driver: Headers, job_id: str, attempt: str, db: Database, desired: Desired
) -> None:
    with db.session() as session:
        session.get_one(JobRow, job_id).desired = desired
    assert report(api, driver, attempt, ReportBatch(seq=1)).json()["desired"] == desired


def test_a_superseded_attempt_may_not_report(
    api: TestClient, driver: Headers, job_id: str, attempt: str, db: Database
) -> None:
    add_attempt(db, job_id, 2, from_step=3)
    response = report(api, driver, attempt, ReportBatch(seq=1, metrics=(point(9, 1.0),)))
    assert response.status_code == 409
    assert _everything(db)[0] == []


def test_metrics_of_an_attempt_that_ended_are_not_lost(
    api: TestClient, driver: Headers, job_id: str, attempt: str, db: Database
) -> None:
    """A driver whose last reports waited on disk while the API was away."""
    with db.session() as session:
        session.get_one(AttemptRow, attempt).state = AttemptState.ENDED
    move(db, job_id, JobState.PREPARING, JobState.SUCCEEDED)
    batch = ReportBatch(seq=1, heartbeats=(heartbeat(0, 9),), metrics=(point(9, 1.0),))
    reply = report(api, driver, attempt, batch)
    assert reply.json() == {"desired": "stop", "acknowledged_seq": 1}
    assert _everything(db)[0] == [("train/loss", 9, 1, 1.0)]
    assert attempt_row(db, attempt).last_report_at is None
