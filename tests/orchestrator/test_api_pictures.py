"""Pictures over HTTP and on the command line: listed, fetched, and no file that the index does not name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from configs.layout import attempt_key, picture_index_key, pictures_prefix
from configs.wire import Picture, PictureFile, PictureIndex
from orchestrator.client import ApiError, Client
from orchestrator.storage.db import Database
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.conftest import ADMIN_TOKEN, headers_for
from tests.orchestrator.rows import T0, add_attempt, add_checkpoint, submit
from tests.orchestrator.test_cli import JOB, NO_EVENTS, Routes, job, ok, patchwork

PNG, NPZ = b"\x89PNG a picture", b"PK the numbers"


def picture(name: str) -> Picture:
    return Picture(
        name=name,
        title="A title",
        caption=f"What {name} shows.",
        image=PictureFile(name=f"{name}.png", num_bytes=len(PNG)),
        numbers=PictureFile(name=f"{name}.npz", num_bytes=len(NPZ)),
    )


def leave_pictures(store: MemoryStore, job_id: str, *names: str) -> None:
    """What an inspect job leaves."""
    for name in names:
        store.put(f"{pictures_prefix(job_id)}{name}.png", PNG)
        store.put(f"{pictures_prefix(job_id)}{name}.npz", NPZ)
    index = PictureIndex(
        job_id=job_id,
        checkpoint_id="ckpt_x",
        step=40,
        dataset="d",
        split="test",
        pictures=tuple(map(picture, names)),
        created_at=T0,
    )
    store.put(picture_index_key(job_id), index.model_dump_json().encode())


@pytest.fixture
def inspect_job(api: TestClient, db: Database) -> str:
    """An inspect job of a checkpoint, submitted as a user would."""
    checkpoint = add_checkpoint(db, str(submit(api)["id"]), 40)
    body = {"kind": "inspect", "init_from": checkpoint, "resources": {"gpus_per_worker": 0}}
    response = api.post("/v1/jobs", json={"spec": body})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    assert made["spec"]["pictures"] == [
        "patch_filters",
        "position_similarity",
        "attention_distance",
        "attention_rollout",
    ]
    assert made["progress"]["total_steps"] is None
    assert made["plan"]["num_examples"] == 128
    return str(made["id"])


@pytest.mark.db
def test_pictures_are_listed_once_they_are_there(api: TestClient, store: MemoryStore, inspect_job: str) -> None:
    path = f"/v1/jobs/{inspect_job}/pictures"
    assert api.get(path).json() == {"checkpoint_id": None, "items": []}
    leave_pictures(store, inspect_job, "patch_filters", "attention_distance")
    found = api.get(path).json()
    assert found["checkpoint_id"] == "ckpt_x"
    assert found["items"] == [picture(name).model_dump() for name in ("patch_filters", "attention_distance")]


def test_a_picture_and_its_numbers_are_served(api: TestClient, store: MemoryStore, inspect_job: str) -> None:
    leave_pictures(store, inspect_job, "patch_filters")
    for name, content, media_type in (
        ("patch_filters.png", PNG, "image/png"),
        ("patch_filters.npz", NPZ, "application/octet-stream"),
    ):
        response = api.get(f"/v1/jobs/{inspect_job}/pictures/{name}")
        assert (response.status_code, response.content) == (200, content)
        assert response.headers["Content-Type"] == media_type
        assert response.headers["Content-Length"] == str(len(content))


@pytest.mark.parametrize(
    "name", ["index.json", "stem_filters.png", "..%2f..%2fattempts%2f0001.json", "patch_filters", "%00", "a/b.png"]
)
def test_no_file_outside_the_index_is_served(
    api: TestClient, db: Database, store: MemoryStore, inspect_job: str, name: str
) -> None:
    leave_pictures(store, inspect_job, "patch_filters")
    store.put(attempt_key(add_attempt(db, inspect_job)), b"secret")
    store.put(f"{pictures_prefix(inspect_job)}stem_filters.png", b"secret")
    response = api.get(f"/v1/jobs/{inspect_job}/pictures/{name}")
    assert response.status_code == 404
    assert b"secret" not in response.content


def test_what_is_not_there_is_not_found(api: TestClient, store: MemoryStore, inspect_job: str) -> None:
    other = str(submit(api)["id"])
    assert api.get(f"/v1/jobs/{other}/pictures").json()["items"] == []
    response = api.get(f"/v1/jobs/{other}/pictures/patch_filters.png")
    assert response.status_code == 404
    assert "pretrain" in response.json()["detail"]
    assert api.get("/v1/jobs/job_01JD3Q8Z6M0000000000000000/pictures").status_code == 404
    leave_pictures(store, inspect_job, "patch_filters")
    del store.objects[f"{pictures_prefix(inspect_job)}patch_filters.png"]
    assert api.get(f"/v1/jobs/{inspect_job}/pictures/patch_filters.png").status_code == 404
    store.put(picture_index_key(inspect_job), b"{}")
    assert api.get(f"/v1/jobs/{inspect_job}/pictures").status_code == 503


def test_pictures_need_a_token(api: TestClient, db: Database, store: MemoryStore, inspect_job: str) -> None:
    leave_pictures(store, inspect_job, "patch_filters")
    for path in ("pictures", "pictures/patch_filters.png"):
        url = f"/v1/jobs/{inspect_job}/{path}"
        assert api.get(url, headers={"Authorization": "Bearer nonsense"}).status_code == 401
        assert api.get(url, headers=headers_for(db, "viewer")).status_code == 200


def test_a_picture_that_a_model_does_not_have_is_told_at_submission(api: TestClient, db: Database) -> None:
    checkpoint = add_checkpoint(db, str(submit(api)["id"]), 40)
    body = {"kind": "inspect", "init_from": checkpoint, "pictures": ["stem_filters"]}
    response = api.post("/v1/jobs", json={"spec": body})
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert (error["pointer"], error["value"]) == ("/pictures/0", "stem_filters")
    assert "attention_rollout" in error["allowed"]


def test_the_client_lists_and_fetches(api: TestClient, store: MemoryStore, inspect_job: str) -> None:
    leave_pictures(store, inspect_job, "patch_filters")

    def pass_on(request: httpx.Request) -> httpx.Response:
        answer = api.request(request.method, request.url.path)
        return httpx.Response(answer.status_code, content=answer.content)

    with Client("http://testserver", ADMIN_TOKEN, transport=httpx.MockTransport(pass_on)) as client:
        (found,) = client.jobs.pictures(inspect_job).items
        out = io.BytesIO()
        assert client.jobs.write_picture(inspect_job, found.image.name, out) == len(PNG)
        assert out.getvalue() == PNG
        with pytest.raises(ApiError, match=r"no picture 'x\.png': it has patch_filters\.png"):
            client.jobs.write_picture(inspect_job, "x.png", io.BytesIO())


# -- the command line --------------------------------------------------------------------------------------------------
CHECKPOINT = {
    "id": "ckpt_01ARZ3NDEKTSV4RRFFQ69G5FAV_s000000040_a0001",
    "job_id": JOB,
    "attempt": 1,
    "step": 40,
    "num_bytes": 1,
    "metrics": {},
    "model": {
        "patch_size": 7,
        "embed_dim": 8,
        "depth": 1,
        "num_heads": 1,
        "mlp_dim": 8,
        "image_size": [28, 28],
        "num_classes": 10,
    },
    "preprocess": {"image_size": [28, 28], "in_channels": 3, "mean": [0.5], "std": [0.5]},
    "aliases": ["best"],
    "available": True,
    "pinned": False,
    "deleted_at": None,
    "created_at": "2026-01-01T00:00:00Z",
}
PAGE = {"checkpoint_id": CHECKPOINT["id"], "items": [picture("patch_filters").model_dump()]}
FILES: Routes = {
    ("GET", f"/v1/jobs/{JOB}/pictures"): ok(PAGE),
    ("GET", f"/v1/jobs/{JOB}/pictures/patch_filters.png"): lambda _: httpx.Response(200, content=PNG),
    ("GET", f"/v1/jobs/{JOB}/pictures/patch_filters.npz"): lambda _: httpx.Response(200, content=NPZ),
}


def cluster(gpus: float) -> dict[str, Any]:
    node = {"id": "n", "alive": True, "cpus": 8.0, "gpus": gpus}
    seen = {"reachable": True, "message": "", "seen_at": None, "controller_at": None}
    return {"cluster_id": "c", "nodes": [node], "jobs": {}} | seen


def test_inspect_submits_waits_and_fetches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[dict[str, Any]] = []

    def create(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content)["spec"])
        return httpx.Response(201, json=job("QUEUED", kind="inspect"))

    done = job("SUCCEEDED", kind="inspect", ended_at="2026-01-01T00:01:00Z")
    routes: Routes = {
        ("GET", f"/v1/checkpoints/{CHECKPOINT['id']}"): ok(CHECKPOINT),
        ("GET", "/v1/cluster"): ok(cluster(0.0)),
        ("POST", "/v1/jobs"): create,
        ("GET", f"/v1/jobs/{JOB}"): ok(done),
        **NO_EVENTS,
        **FILES,
    }
    folder = tmp_path / "new" / "pictures"
    arguments = ["inspect", str(CHECKPOINT["id"]), "-p", "patch_filters", "--set", "seed=7", "--to", str(folder)]
    assert patchwork(routes, *arguments) == 0
    assert sent == [
        {
            "kind": "inspect",
            "name": "inspect",
            "init_from": CHECKPOINT["id"],
            "pictures": ["patch_filters"],
            "seed": 7,
            "resources": {"gpus_per_worker": 0},
        }
    ]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "patch_filters.png": PNG,
        "patch_filters.npz": NPZ,
    }
    said = capsys.readouterr().out
    assert "What patch_filters shows." in said
    assert str(folder / "patch_filters.png") in said


def created(sent: list[dict[str, Any]], gpus: float) -> Routes:
    """What `inspect` of CHECKPOINT asks for on a cluster with so many GPUs; the job it sends is put into `sent`."""

    def create(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content)["spec"])
        return httpx.Response(201, json=job("QUEUED", kind="inspect"))

    return {
        ("GET", f"/v1/checkpoints/{CHECKPOINT['id']}"): ok(CHECKPOINT),
        ("GET", "/v1/cluster"): ok(cluster(gpus)),
        ("POST", "/v1/jobs"): create,
        ("GET", f"/v1/jobs/{JOB}/pictures"): ok({"checkpoint_id": None, "items": []}),
    }


def test_inspect_takes_a_gpu_where_there_is_one_and_says_what_is_next(capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[dict[str, Any]] = []
    routes = created(sent, 8.0)
    assert patchwork(routes, "inspect", str(CHECKPOINT["id"])) == 0
    assert sent[0]["resources"] == {"gpus_per_worker": 1}
    assert f"patchwork inspect {JOB} --to DIR" in capsys.readouterr().out


def test_inspect_of_an_inspect_job_fetches_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    routes: Routes = {("GET", f"/v1/jobs/{JOB}"): ok(job("SUCCEEDED", kind="inspect")), **FILES}
    assert patchwork(routes, "inspect", JOB, "--to", str(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == [str(tmp_path / "patch_filters.png"), str(tmp_path / "patch_filters.npz")]
    assert patchwork(routes, "inspect", JOB, "--images", "5") == 1
    assert "is an inspect job" in capsys.readouterr().err


def test_inspect_of_a_job_that_failed_is_no_success(tmp_path: Path) -> None:
    routes: Routes = {
        ("GET", f"/v1/jobs/{JOB}"): ok(job("FAILED", kind="inspect", reason="DATA_ERROR")),
        ("GET", f"/v1/jobs/{JOB}/pictures"): ok({"checkpoint_id": None, "items": []}),
    }
    assert patchwork(routes, "inspect", JOB, "--to", str(tmp_path / "none")) == 1
    assert not (tmp_path / "none").exists()


def test_inspect_of_images_of_ones_own_uploads_them_first(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []
    uploaded: list[bytes] = []

    def upload(request: httpx.Request) -> httpx.Response:
        uploaded.append(request.content)
        times = {"created_at": T0.isoformat(), "expires_at": T0.isoformat()}
        return httpx.Response(201, json={"id": f"img_{len(uploaded)}", "num_bytes": 1, "media_type": "x"} | times)

    routes = created(sent, 0.0) | {("POST", "/v1/images"): upload}
    for name in ("cat.png", "dog.png"):
        (tmp_path / name).write_bytes(name.encode())
    files = [str(tmp_path / name) for name in ("cat.png", "dog.png")]
    assert patchwork(routes, "inspect", str(CHECKPOINT["id"]), "-i", files[0], "-i", files[1]) == 0
    assert uploaded == [b"cat.png", b"dog.png"]
    assert sent[0]["data"] == {"source": {"type": "images", "ids": ["img_1", "img_2"]}}
    assert sent[0]["pictures"] == ["attention_distance", "attention_rollout"]
