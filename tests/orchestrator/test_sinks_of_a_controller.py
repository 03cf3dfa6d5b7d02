"""Sinks in the controller and in the API: who writes, what is shown, what holds nobody up."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from configs.layout import tensorboard_prefix
from orchestrator.control.controller import Controller
from orchestrator.control.sinks.configured import configured_sinks
from orchestrator.embedded.server import sink_settings
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from tests.fakes.launcher import FakeLauncher
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.reported import ReportedJob
from tests.orchestrator.test_controller import running, until
from tests.orchestrator.test_sink_tensorboard import shown


def settings_with(**values: object) -> Settings:
    return Settings.model_validate({"poll_s": 0.1, "lease_s": 5, "sink_every_s": 0.05, **values})


@pytest.mark.db
def test_controllers_that_follow_one_another_write_every_point_once(db: Database) -> None:
    store = MemoryStore()
    job = ReportedJob(db)

    def steps() -> list[int]:
        return [step for step, _ in shown(store, job).get("train/loss", [])]

    for step in (1, 2, 3):
        with running(Controller(db, FakeLauncher(), store, settings_with())):
            job.losses(step)
            until(lambda: len(steps()) == step, f"step {step} is in the event file")  # noqa: B023
        job.losses(step + 10)  # while nobody leads
        with running(Controller(db, FakeLauncher(), store, settings_with())):
            until(lambda: len(steps()) == step + 1, f"step {step + 10} is in the event file")  # noqa: B023
        assert steps()[-1] == step + 10
        job.begin(step)
    assert list(store.list(tensorboard_prefix(job.id)))


def test_a_sink_that_hangs_holds_up_neither_others_nor_the_next_leader(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's server takes the connection and never answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
        store, job = MemoryStore(), ReportedJob(db)
        job.losses(1)
        first = Controller(db, FakeLauncher(), store, settings_with(mlflow_tracking_uri=uri))
        with running(first):
            silent.accept()
            until(lambda: shown(store, job), "TensorBoard's file is written meanwhile")
            second = Controller(db, FakeLauncher(), store, settings_with())
            with running(second):
                first.stop()
                until(lambda: second.leads, "the next one leads at once", timeout_s=4.0)


def test_the_condition_of_sinks_is_shown(api: TestClient, db: Database) -> None:
    assert api.get("/v1/cluster").json()["sinks"] == []
    job = ReportedJob(db)
    job.losses(1)
    settings = settings_with(mlflow_tracking_uri="http://ada:hunter2@127.0.0.1:9", tensorboard=True)

    def sinks() -> dict[str, bool]:
        return {sink["name"]: sink["ok"] for sink in api.get("/v1/cluster").json()["sinks"]}

    with running(Controller(db, FakeLauncher(), MemoryStore(), settings)):
        until(lambda: sinks() == {"mlflow": False, "tensorboard": True}, "both are shown")
    assert "hunter2" not in api.get("/v1/cluster").text
    with running(Controller(db, FakeLauncher(), MemoryStore(), settings_with())):
        until(lambda: sinks() == {"tensorboard": True}, "the one that is not configured any more goes")


def test_sinks_are_those_of_the_settings(tmp_path: Path) -> None:
    def names(**values: object) -> list[str]:
        return [sink.name for sink in configured_sinks(settings_with(**values), MemoryStore())]

    assert names() == ["tensorboard"]
    assert names(tensorboard=False) == []
    offline = {"wandb_project": "vit", "wandb_mode": "offline", "wandb_dir": tmp_path}
    assert names(mlflow_tracking_uri="http://127.0.0.1:9", **offline) == ["tensorboard", "mlflow", "wandb"]


def test_settings_that_do_not_apply_are_refused() -> None:
    with pytest.raises(ValidationError, match="wandb_dir is needed with wandb_mode 'offline'"):
        settings_with(wandb_project="vit", wandb_mode="offline")
    with pytest.raises(ValidationError, match="wandb_entity does not apply without wandb_project"):
        settings_with(wandb_entity="team")
    written = settings_with().model_dump(mode="json")
    assert Settings.model_validate(written).model_dump(mode="json") == written, "a file with every default is valid"


def test_no_secret_is_in_the_settings_text() -> None:
    settings = settings_with(mlflow_tracking_uri="http://ada:hunter2@mlflow.example")
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump_json()}"


def test_a_stack_hands_on_what_its_environment_says_of_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sink_settings() == {}
    monkeypatch.setenv("PATCHWORK_MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("PATCHWORK_TENSORBOARD", "false")
    monkeypatch.setenv("PATCHWORK_DATABASE_URL", "sqlite:///elsewhere.db")
    assert sink_settings() == {"mlflow_tracking_uri": "http://127.0.0.1:5000", "tensorboard": "false"}
    assert not Settings.model_validate(sink_settings()).tensorboard
