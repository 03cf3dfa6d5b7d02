"""Images over HTTP: kept in the store, named by inspect jobs, refused where they are none."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import func, select
from starlette.testclient import TestClient

from configs.layout import image_key
from orchestrator.control.sweep_uploads import sweep_images
from orchestrator.services.images import MAX_IMAGE_BYTES, MEDIA_TYPES, media_type_of
from orchestrator.storage.db import Database
from orchestrator.storage.store import StoreUnavailable
from orchestrator.storage.tables import ImageRow
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.conftest import headers_for
from tests.orchestrator.rows import add_checkpoint, submit


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, kind)
    return out.getvalue()


def num_images(db: Database) -> int:
    with db.reader() as session:
        return session.scalar(select(func.count()).select_from(ImageRow)) or 0


def inspection(checkpoint: str, *ids: str) -> dict[str, Any]:
    data = {"source": {"type": "images", "ids": list(ids)}}
    spec = {"kind": "inspect", "init_from": checkpoint, "data": data, "resources": {"gpus_per_worker": 0}}
    return {"spec": spec}


@pytest.mark.db
def test_an_uploaded_image_can_be_looked_at(api: TestClient, db: Database, store: MemoryStore) -> None:
    content = encoded("PNG")
    response = api.post("/v1/images", content=content, headers={"Content-Type": "image/png"})
    assert response.status_code == 201, response.text
    made = response.json()
    assert (made["num_bytes"], made["media_type"]) == (len(content), "image/png")
    assert made["expires_at"] > made["created_at"]
    assert store.get(image_key(made["id"])) == content
    checkpoint = add_checkpoint(db, str(submit(api)["id"]), 40)
    created = api.post("/v1/jobs", json=inspection(checkpoint, made["id"]))
    assert created.status_code == 201, created.text
    assert created.json()["plan"]["num_examples"] == 1
    assert created.json()["spec"]["num_rollout_images"] == 1


def test_a_job_of_an_image_that_is_not_there_is_refused(api: TestClient, db: Database) -> None:
    checkpoint = add_checkpoint(db, str(submit(api)["id"]), 40)
    known = api.post("/v1/images", content=encoded("PNG")).json()["id"]
    unknown = "img_01ARZ3NDEKTSV4RRFFQ69G5FAV"
    for path in ("/v1/jobs", "/v1/plans"):
        response = api.post(path, json=inspection(checkpoint, known, unknown))
        assert response.status_code == 422
        (error,) = response.json()["errors"]
        assert (error["pointer"], error["value"]) == ("/data/source/ids/1", unknown)
        assert "upload it" in error["message"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_every_kind_of_image_that_workers_decode_is_known(kind: str) -> None:
    assert media_type_of(encoded(kind)) == f"image/{kind.lower()}"
    assert media_type_of(encoded(kind)) in MEDIA_TYPES


@pytest.mark.parametrize("content", [b"", b"hello", b"<svg onload=alert(1)>", b"RIFF1234WAVE", b"\x80\x04pickle"])
def test_what_is_no_image_is_refused_and_not_kept(
    api: TestClient, db: Database, store: MemoryStore, content: bytes
) -> None:
    response = api.post("/v1/images", content=content)
    assert response.status_code == 422
    assert "image/png" in response.json()["errors"][0]["allowed"]
    assert num_images(db) == 0
    assert list(store.list("images/")) == []


def test_an_image_that_is_too_large_is_refused(api: TestClient, db: Database) -> None:
    beginning = encoded("PNG")
    fits = beginning + bytes(MAX_IMAGE_BYTES - len(beginning))
    assert api.post("/v1/images", content=fits).status_code == 201
    assert api.post("/v1/images", content=fits + b"0").status_code == 413
    assert num_images(db) == 1


def test_what_the_store_may_not_have_taken_is_swept(
    api: TestClient, db: Database, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store.put

    def refuse(key: str, data: bytes) -> None:
        kept(key, data)  # the answer was lost
        raise StoreUnavailable("the store is away")

    monkeypatch.setattr(store, "put", refuse)
    assert api.post("/v1/images", content=encoded("PNG")).status_code == 503
    (found,) = store.list("images/")
    assert [image_key(image_id) for image_id in sweep_images(db, store, datetime.now(UTC))] == [found.key]
    assert num_images(db) == 0
    assert list(store.list("images/")) == []


def test_an_image_is_kept_from_when_a_job_names_it(api: TestClient, db: Database) -> None:
    checkpoint = add_checkpoint(db, str(submit(api)["id"]), 40)
    image_id = api.post("/v1/images", content=encoded("PNG")).json()["id"]
    with db.session() as session:
        row = session.get_one(ImageRow, image_id)
        week = row.expires_at - row.created_at
        row.created_at -= week - timedelta(hours=1)
        row.expires_at -= week - timedelta(hours=1)
        expires_at = row.expires_at
    assert api.post("/v1/plans", json=inspection(checkpoint, image_id)).status_code == 200
    with db.reader() as session:
        assert session.get_one(ImageRow, image_id).expires_at == expires_at, "a plan keeps nothing"
    assert api.post("/v1/jobs", json=inspection(checkpoint, image_id)).status_code == 201
    with db.reader() as session:
        row = session.get_one(ImageRow, image_id)
        assert row.expires_at - row.created_at == week
        assert row.expires_at - expires_at > week - timedelta(hours=2)


def test_viewers_upload_nothing(api: TestClient, db: Database) -> None:
    assert api.post("/v1/images", content=encoded("PNG"), headers=headers_for(db, "viewer")).status_code == 403
