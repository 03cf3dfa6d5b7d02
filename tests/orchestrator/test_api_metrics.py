"""Metrics as read: one line per name across resumes, downsampled by the server."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from orchestrator.services.metrics import Point, downsample
from orchestrator.storage.arrivals import last_valid_steps
from orchestrator.storage.db import Database
from orchestrator.storage.tables import MetricRow
from tests.orchestrator.rows import T0, add_attempt, submit


@pytest.fixture
def job_id(api: TestClient) -> str:
    return str(submit(api)["id"])


def add_points(
    db: Database, job_id: str, attempt: int, points: dict[int, float | None], name: str = "train/loss"
) -> None:
    with db.session() as session:
        session.add_all(
            MetricRow(job_id=job_id, name=name, step=step, attempt=attempt, value=value, at=T0)
            for step, value in points.items()
        )


def series(api: TestClient, job_id: str, **query: Any) -> dict[str, Any]:
    (found,) = api.get(f"/v1/jobs/{job_id}/metrics", params={"names": "train/loss", **query}).json()["series"]
    return dict(found)


@pytest.mark.db
def test_points_are_cut_where_the_next_attempt_resumed(api: TestClient, db: Database, job_id: str) -> None:
    add_attempt(db, job_id, 1)
    add_attempt(db, job_id, 2, from_step=20)
    add_attempt(db, job_id, 3, from_step=20)
    add_points(db, job_id, 1, {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0})
    add_points(db, job_id, 2, {30: 33.0})
    add_points(db, job_id, 3, {20: 22.0, 30: 333.0})
    found = series(api, job_id)
    assert found["steps"] == [10, 20, 30]
    assert found["values"] == [1.0, 22.0, 333.0]
    assert found["attempts"] == [1, 3, 3]
    assert found["num_points"] == 3


def test_a_job_that_started_over_forgets_the_first_try(api: TestClient, db: Database, job_id: str) -> None:
    add_attempt(db, job_id, 1)
    add_attempt(db, job_id, 2, from_step=0)
    add_points(db, job_id, 1, {10: 1.0})
    assert series(api, job_id)["steps"] == []


@pytest.mark.db
def test_long_series_are_joined_and_keep_their_extremes(api: TestClient, db: Database, job_id: str) -> None:
    add_attempt(db, job_id)
    values: dict[int, float | None] = dict.fromkeys(range(1, 1001), 0.0)
    values |= {500: 100.0, 700: -100.0}
    add_points(db, job_id, 1, values)
    found = series(api, job_id, max_points=10)
    assert found["steps"] == list(range(100, 1001, 100))
    assert (max(found["highs"]), min(found["lows"])) == (100.0, -100.0)
    assert found["values"][4] == 1.0
    assert found["num_points"] == 1000


def test_values_that_were_not_finite_are_null(api: TestClient, db: Database, job_id: str) -> None:
    add_attempt(db, job_id)
    add_points(db, job_id, 1, {1: 1.0, 2: None})
    assert series(api, job_id)["values"] == [1.0, None]


def test_names_choose_and_all_are_listed(api: TestClient, db: Database, job_id: str) -> None:
    add_attempt(db, job_id)
    for name in ("train/loss", "train/lr", "eval/top1"):
        add_points(db, job_id, 1, {1: 1.0}, name)
    everything = api.get(f"/v1/jobs/{job_id}/metrics").json()
    assert everything["names"] == [s["name"] for s in everything["series"]] == ["eval/top1", "train/loss", "train/lr"]
    some = api.get(f"/v1/jobs/{job_id}/metrics?names=train/lr,none").json()
    assert [s["name"] for s in some["series"]] == ["train/lr"]
    assert some["names"] == everything["names"]


def test_last_valid_steps() -> None:
    assert last_valid_steps({1: 0, 2: 40, 3: 20, 4: 60}) == {1: 20, 2: 20, 3: 60, 4: None}
    assert last_valid_steps({}) == {}


@given(
    values=st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=60),
    max_points=st.integers(1, 20),
    stride=st.integers(1, 7),
)
def test_downsampling_keeps_ends_extremes_and_counts(values: list[float | None], max_points: int, stride: int) -> None:
    points = [Point(step=5 + index * stride, attempt=1, value=value) for index, value in enumerate(values)]
    found = downsample(points, "x", points[0].step, points[-1].step, max_points)
    finite = [value for value in values if value is not None]
    assert len(found.steps) <= max_points
    assert list(found.steps) == sorted(set(found.steps))
    assert found.steps[-1] == points[-1].step
    assert found.num_points == len(points)
    assert min((low for low in found.lows if low is not None), default=None) == min(finite, default=None)
    assert max((high for high in found.highs if high is not None), default=None) == max(finite, default=None)
