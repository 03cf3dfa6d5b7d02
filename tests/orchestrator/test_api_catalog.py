"""Presets, data sets, plans, the cluster and health over HTTP."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from configs.load import list_presets
from configs.wire import DatasetIndex
from orchestrator.api.app import create_app
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.tables import ClusterRow
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.rows import spec_with, submit


# -- presets and plans -------------------------------------------------------------------------------------------------
def test_presets_are_listed_and_found(api: TestClient) -> None:
    items = api.get("/v1/presets").json()["items"]
    assert [item["name"] for item in items] == [info.name for info in list_presets()]
    one = api.get(f"/v1/presets/{items[0]['name']}")
    assert one.json() == items[0]
    assert api.get("/v1/presets/paper/nothing").status_code == 404


WITH_SIZES = [info for info in list_presets() if {"variant", "embed_dim"} & set(info.spec.get("model", {}))]


@pytest.mark.parametrize("info", WITH_SIZES, ids=lambda info: info.name)
def test_every_preset_that_gives_its_sizes_can_be_planned(api: TestClient, info: Any) -> None:
    response = api.post("/v1/plans", json={"spec": {"preset": info.name}})
    assert response.status_code == 200, response.text
    assert response.json()["parameters"] > 10_000


def test_a_fine_tune_whose_checkpoint_decides_its_sizes_cannot_be_planned_without_it(api: TestClient) -> None:
    spec = spec_with(kind="finetune")
    assert api.post("/v1/plans", json={"spec": spec}).status_code == 200
    spec["model"] = {"image_size": 28}
    response = api.post("/v1/plans", json={"spec": spec})
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == ["/init_from"]


def test_a_plan_for_other_hardware(api: TestClient) -> None:
    body = {"spec": {"preset": "paper/pretrain/jft300m-h14"}, "gpu": "H100:8"}
    plan = api.post("/v1/plans", json=body).json()
    assert (plan["accelerator"], plan["world_size"]) == ("H100", 8)
    assert plan["hours"] > 1
    assert any("not public" in note for note in plan["notes"])
    wrong = api.post("/v1/plans", json=body | {"gpu": "H900"})
    assert [error["pointer"] for error in wrong.json()["errors"]] == ["/gpu"]


def test_what_can_only_be_planned_cannot_be_submitted(api: TestClient) -> None:
    response = api.post("/v1/jobs", json={"spec": {"preset": "paper/pretrain/jft300m-h14"}})
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == ["/data/source/name"]


# -- data sets ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def flowers(settings: Settings) -> Path:
    assert settings.data_root is not None
    folder = settings.data_root / "flowers"
    for split, count in (("train", 3), ("test", 1)):
        for kind in ("rose", "tulip"):
            (folder / split / kind).mkdir(parents=True)
            for index in range(count):
                (folder / split / kind / f"{index}.png").write_bytes(b"x" * (index + 1))
    return folder


@pytest.mark.db
def test_a_registered_folder_can_be_trained_on(api: TestClient, store: MemoryStore, flowers: Path) -> None:
    response = api.post("/v1/datasets", json={"name": "flowers", "path": "flowers"})
    assert response.status_code == 201, response.text
    card = response.json()["card"]
    assert (card["num_classes"], card["class_names"], card["path"]) == (2, ["rose", "tulip"], "flowers")
    index = DatasetIndex.model_validate_json(store.get(card["index_key"]))
    assert index.fingerprint == card["fingerprint"]
    assert api.get("/v1/datasets/flowers").json() == response.json()

    job = submit(api, data__source={"type": "folder", "name": "flowers"}, train__global_batch_size=6)
    assert job["spec"]["model"]["num_classes"] == 2
    contradiction = spec_with(
        data__source={"type": "folder", "name": "flowers"}, train__global_batch_size=6, model__num_classes=10
    )
    refused = api.post("/v1/jobs", json={"spec": contradiction})
    assert [error["pointer"] for error in refused.json()["errors"]] == ["/model/num_classes"]


def test_registering_again_takes_a_changed_folder_and_refuses_another_one(api: TestClient, flowers: Path) -> None:
    first = api.post("/v1/datasets", json={"name": "flowers", "path": "flowers"}).json()
    (flowers / "train" / "rose" / "new.png").write_bytes(b"x")
    second = api.post("/v1/datasets", json={"name": "flowers", "path": "flowers"}).json()
    assert first["card"]["fingerprint"] != second["card"]["fingerprint"]
    flowers.rename(flowers.with_name("weeds"))
    other = api.post("/v1/datasets", json={"name": "flowers", "path": "weeds"})
    assert other.status_code == 409


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"name": "flowers", "path": "../flowers"}, "/path"),
        ({"name": "flowers", "path": "/etc"}, "/path"),
        ({"name": "flowers", "path": "nothing"}, "/path"),
        ({"name": "flowers", "path": "link"}, "/path"),
        ({"name": "flowers", "path": "a\x00b"}, "/path"),
        ({"name": "flowers", "path": "a" * 1000}, "/path"),
        ({"name": "../x", "path": "flowers"}, "/name"),
        ({"name": "flowers"}, "/path"),
        ({"name": "flowers", "path": "flowers", "url": "http://x"}, "/url"),
    ],
)
def test_a_folder_that_cannot_be_registered_is_named(
    api: TestClient, flowers: Path, tmp_path: Path, store: MemoryStore, body: dict[str, Any], pointer: str
) -> None:
    (tmp_path / "outside" / "train" / "a").mkdir(parents=True)
    (flowers.parent / "link").symlink_to(tmp_path / "outside")
    response = api.post("/v1/datasets", json=body)
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]
    assert store.objects == {}


def test_data_that_can_only_be_planned_with_is_marked(api: TestClient) -> None:
    items = {item["name"]: item for item in api.get("/v1/datasets").json()["items"]}
    assert items["FashionMNIST"]["available"]
    assert not items["jft300m"]["available"]
    assert api.get("/v1/datasets/none").status_code == 404


# -- the cluster and health --------------------------------------------------------------------------------------------
def see_cluster(db: Database, **fields: Any) -> None:
    now = datetime.now(UTC)
    node = {"id": "n1", "alive": True, "cpus": 2.0, "gpus": 0.0, "accelerator": None}
    values = {"cluster_id": "session_1", "reachable": True, "nodes": [node], "seen_at": now, "controller_at": now}
    with db.session() as session:
        session.merge(ClusterRow(id=1, message="", **(values | fields)))


def checks(client: TestClient) -> dict[str, bool]:
    return {check["name"]: check["ok"] for check in client.get("/readyz").json()["checks"]}


@pytest.mark.db
def test_the_cluster_is_shown_as_the_controller_saw_it(api: TestClient, db: Database) -> None:
    assert api.get("/v1/cluster").json()["reachable"] is False
    submit(api)
    see_cluster(db)
    cluster = api.get("/v1/cluster").json()
    assert cluster["nodes"][0]["cpus"] == 2.0
    assert cluster["jobs"] == {"QUEUED": 1}


def test_health_needs_no_token(anonymous: TestClient) -> None:
    assert anonymous.get("/healthz").json()["status"] == "ok"


def test_ready_with_everything_there(anonymous: TestClient, db: Database) -> None:
    see_cluster(db)
    response = anonymous.get("/readyz")
    assert response.status_code == 200
    assert response.json()["ready"]
    assert all(checks(anonymous).values())


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        ({"controller_at": datetime.now(UTC) - timedelta(hours=1)}, "controller"),
        ({"controller_at": None}, "controller"),
        ({"reachable": False}, "ray"),
        ({"seen_at": datetime.now(UTC) - timedelta(hours=1)}, "ray"),
    ],
)
def test_without_a_controller_or_ray_the_api_serves_and_says_so(
    anonymous: TestClient, db: Database, fields: dict[str, Any], bad: str
) -> None:
    see_cluster(db, **fields)
    assert anonymous.get("/readyz").status_code == 200
    assert [name for name, ok in checks(anonymous).items() if not ok] == [bad]


def test_not_ready_without_the_store(anonymous: TestClient, store: MemoryStore) -> None:
    store.fail_next = 1
    response = anonymous.get("/readyz")
    assert response.status_code == 503
    assert not response.json()["ready"]
    assert checks(anonymous)["store"] is False


def test_without_its_database_the_api_says_so(settings: Settings, store: MemoryStore) -> None:
    db = Database("postgresql+psycopg://user:pass-canary@127.0.0.1:1/none")
    with TestClient(create_app(settings, db, store), raise_server_exceptions=False) as client:
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert "canary" not in ready.text
        answer = client.get("/v1/jobs", headers={"Authorization": "Bearer pw_x"})
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        assert client.get("/healthz").status_code == 200
    db.close()
