"""Runs in a real tracking store of MLflow, read back with its own client."""

from __future__ import annotations

import logging
import math
import sys
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from sqlalchemy import delete

from configs.states import JobState
from orchestrator.control.sinks.deliver import Deliverer
from orchestrator.control.sinks.mlflow import MlflowSink
from orchestrator.control.sinks.sink import SinkUnavailable
from orchestrator.storage.db import Database
from orchestrator.storage.tables import EventRow, SinkCursorRow, SinkRow
from tests.factories import NOW
from tests.orchestrator.reported import ReportedJob, loss

LATER = NOW + timedelta(hours=2)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def sink(uri: str) -> MlflowSink:
    """With an experiment of its own."""
    return MlflowSink(uri, f"experiment-{uuid.uuid4().hex}", 0.0, "https://patchwork.example/")


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)


def runs_of(client: MlflowClient, sink: MlflowSink, view: int = ViewType.ACTIVE_ONLY) -> list[Any]:
    experiment = client.get_experiment_by_name(sink._experiment)
    return list(client.search_runs([experiment.experiment_id], run_view_type=view))


def history(client: MlflowClient, run: Any, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))


def test_a_job_is_a_run(db: Database, sink: MlflowSink, client: MlflowClient) -> None:
    job = ReportedJob(db, name="first try", labels={"team": "vision"})
    job.losses(1, 2)
    job.report({("train/loss", 3): None})
    Deliverer(db, sink).look(NOW)
    (run,) = runs_of(client, sink)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "first try"
    assert run.info.start_time == int(NOW.timestamp() * 1000)
    assert run.data.tags["patchwork.job_id"] == job.id
    assert run.data.tags["patchwork.state"] == "RUNNING"
    assert run.data.tags["patchwork.url"] == f"https://patchwork.example/v1/jobs/{job.id}"
    assert run.data.tags["label.team"] == "vision"
    assert run.data.params["optim.lr"] == "0.0003"
    assert run.data.params["optim.betas"] == "[0.9, 0.999]"
    assert "model.gelu" not in run.data.params
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(p.step, p.value) for p in points[:2]] == [(1, loss(1, 1)), (2, loss(2, 1))]
    assert points[0].timestamp == int((NOW + timedelta(minutes=1, seconds=1)).timestamp() * 1000)
    assert points[2].step == 3
    assert math.isnan(points[2].value)
    job.end(JobState.CANCELLED)
    Deliverer(db, sink).look(NOW)
    (run,) = runs_of(client, sink)
    assert (run.info.status, run.data.tags["patchwork.state"]) == ("KILLED", "CANCELLED")
    assert run.info.end_time == int((NOW + timedelta(hours=1)).timestamp() * 1000)


def test_whatever_is_written_again_is_there_once(db: Database, sink: MlflowSink, client: MlflowClient) -> None:
    """A controller that dies after each write, before it notes it."""
    job = ReportedJob(db)
    for steps in ((1, 2), (3, 4)):
        job.losses(*steps)
        for _ in range(2):
            Deliverer(db, sink).look(NOW)
            with db.session() as session:
                session.execute(delete(SinkCursorRow))
    Deliverer(db, sink).look(NOW)
    (run,) = runs_of(client, sink)
    assert history(client, run, "train/loss") == [(step, loss(step, 1)) for step in (1, 2, 3, 4)]


def test_rolled_back_steps_are_there_once(db: Database, sink: MlflowSink, client: MlflowClient) -> None:
    job = ReportedJob(db)
    job.losses(1, 2, 3, 4)
    Deliverer(db, sink).look(NOW)
    (before,) = runs_of(client, sink)
    job.begin(2)
    job.losses(3)
    job.end()
    Deliverer(db, sink).look(NOW)
    (run,) = runs_of(client, sink)
    assert history(client, run, "train/loss") == [(1, loss(1, 1)), (2, loss(2, 1)), (3, loss(3, 2))]
    assert run.info.status == "FINISHED"
    (deleted,) = runs_of(client, sink, ViewType.DELETED_ONLY)
    assert deleted.info.run_id == before.info.run_id


def test_more_than_one_request_holds(db: Database, sink: MlflowSink, client: MlflowClient) -> None:
    """1,000 metrics and 100 parameters go into one request."""
    job = ReportedJob(db)
    with db.session() as session:
        from orchestrator.storage.tables import JobRow

        keys = ", ".join(f'"key{i}": {i}' for i in range(150))
        long = "x" * 7000
        session.get_one(JobRow, job.id).spec_json = f'{{"many": {{{keys}}}, "long": "{long}"}}'.encode()
    job.report({(f"perf/x/rank-{rank:05d}", 1): float(rank) for rank in range(2500)})
    Deliverer(db, sink).look(NOW)
    (run,) = runs_of(client, sink)
    assert len(run.data.metrics) == 2500
    assert len(run.data.params) == 151
    assert run.data.params["long"] == "x" * 5999 + "…"


def test_a_server_that_is_away_is_said_without_its_password(db: Database) -> None:
    job = ReportedJob(db)
    job.losses(1)
    sink = MlflowSink("http://ada:hunter2@127.0.0.1:9", "x", 0.0)
    Deliverer(db, sink).look(NOW)
    with db.reader() as session:
        row = session.get_one(SinkRow, "mlflow")
        told = [event.type for event in session.query(EventRow).where(EventRow.job_id == job.id)]
    assert not row.ok
    assert "MLflow" in row.message
    assert "hunter2" not in row.message
    assert "metrics.delayed" not in told


def test_a_deleted_experiment_is_named(db: Database, sink: MlflowSink, client: MlflowClient) -> None:
    client.delete_experiment(client.create_experiment(sink._experiment))
    with pytest.raises(SinkUnavailable, match="was deleted in MLflow"):
        sink.prepare()


def test_what_mlflow_refuses_of_one_job_is_told_there(
    db: Database, sink: MlflowSink, client: MlflowClient, tmp_path: Path
) -> None:
    job = ReportedJob(db)
    job.report({("../loss", 1): 1.0})
    Deliverer(db, sink).look(NOW)
    with db.reader() as session:
        (event,) = session.query(EventRow).where(EventRow.job_id == job.id, EventRow.type == "metrics.delayed")
        assert session.get_one(SinkRow, "mlflow").ok
    assert "MLflow refused it" in event.message
    assert "../loss" in event.message


def test_without_the_package_it_is_said_what_to_install(sink: MlflowSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SinkUnavailable, match=r"pip install 'patchwork-vit\[sinks\]'"):
        sink.prepare()
