"""Checkpoints, exports and reports over HTTP: files whole and in part, and no file that the manifest does not name."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from configs.ids import checkpoint_id
from configs.layout import attempt_key, checkpoint_prefix, export_prefix, manifest_key, report_key
from configs.wire import EvaluationReport, Manifest, ShardFile
from orchestrator.api.app import create_app
from orchestrator.services.checkpoints import ByteRange, parse_range
from orchestrator.services.problems import RangeNotSatisfiable
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.registry import apply_retention
from tests.fakes.memory_store import MemoryStore
from tests.orchestrator.conftest import ADMIN_TOKEN, headers_for
from tests.orchestrator.rows import MODEL, PREPROCESS, T0, add_attempt, add_checkpoint, submit

SHARD = "shards/weights-00000-of-00001.safetensors"
CONTENT = bytes(range(256)) * 4


@pytest.fixture
def job_id(api: TestClient) -> str:
    return str(submit(api)["id"])


@pytest.fixture
def checkpoint(db: Database, store: MemoryStore, job_id: str) -> str:
    """A checkpoint of step 40, with its manifest and one shard in the store."""
    prefix = checkpoint_prefix(job_id, 40, 1)
    shard = ShardFile(name=SHARD, rank=0, role="weights", num_bytes=len(CONTENT), crc32c=(1,), slices=())
    manifest = Manifest(
        checkpoint_id=checkpoint_id(job_id, 40, 1),
        job_id=job_id,
        attempt=1,
        step=40,
        position=2560,
        total_steps=100,
        world_size=2,
        zero_stage=1,
        optimizer="adamw",
        optimizer_step=40,
        spec_hash="sha256:x",
        training_fingerprint="sha256:x",
        data_fingerprint="sha256:x",
        versions={},
        metrics={},
        model=MODEL,
        preprocess=PREPROCESS,
        tensors={},
        files=(shard,),
        nonce="n",
        created_at=T0,
    )
    store.put(manifest_key(prefix), manifest.model_dump_json().encode())
    store.put(prefix + SHARD, CONTENT)
    store.put(prefix + "shards/stray.safetensors", b"not in the manifest")
    return add_checkpoint(db, job_id, 40)


@pytest.mark.db
def test_checkpoints_are_listed_with_their_aliases(api: TestClient, db: Database, job_id: str, checkpoint: str) -> None:
    latest = add_checkpoint(db, job_id, 60, metrics={"eval/top1": 0.01})
    deleted = add_checkpoint(db, job_id, 20, deleted_at=T0)
    items = api.get(f"/v1/jobs/{job_id}/checkpoints").json()["items"]
    assert [(c["id"], c["aliases"], c["available"]) for c in items] == [
        (latest, ["latest"], True),
        (checkpoint, ["best"], True),
        (deleted, [], False),
    ]
    assert api.get(f"/v1/checkpoints/{checkpoint}").json() == items[1]


def test_the_manifest_is_served(api: TestClient, checkpoint: str) -> None:
    manifest = Manifest.model_validate_json(api.get(f"/v1/checkpoints/{checkpoint}/manifest").content)
    assert manifest.files[0].name == SHARD


def test_a_file_is_served_whole_and_in_ranges(api: TestClient, checkpoint: str) -> None:
    path = f"/v1/checkpoints/{checkpoint}/files/{SHARD}"
    whole = api.get(path)
    assert (whole.status_code, whole.content) == (200, CONTENT)
    assert whole.headers["Accept-Ranges"] == "bytes"
    assert whole.headers["Content-Length"] == str(len(CONTENT))
    etag = whole.headers["ETag"]
    for header, start, end in (("bytes=0-9", 0, 9), ("bytes=1000-", 1000, 1023), ("bytes=-5", 1019, 1023)):
        part = api.get(path, headers={"Range": header})
        assert (part.status_code, part.content) == (206, CONTENT[start : end + 1])
        assert part.headers["Content-Range"] == f"bytes {start}-{end}/1024"
        assert part.headers["Content-Length"] == str(end + 1 - start)
        assert part.headers["ETag"] == etag
    outside = api.get(path, headers={"Range": "bytes=1024-"})
    assert outside.status_code == 416
    assert outside.headers["Content-Range"] == "bytes */1024"
    assert outside.json()["code"] == "range_not_satisfiable"


def test_if_range_with_another_etag_gets_the_whole_file(api: TestClient, checkpoint: str) -> None:
    path = f"/v1/checkpoints/{checkpoint}/files/{SHARD}"
    etag = api.get(path).headers["ETag"]
    assert api.get(path, headers={"Range": "bytes=0-1", "If-Range": etag}).status_code == 206
    assert api.get(path, headers={"Range": "bytes=0-1", "If-Range": '"old"'}).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "shards/stray.safetensors",
        "../step-000000060-a0001/manifest.json",
        "../../attempts/0001.json",
        "%2e%2e/%2e%2e/attempts/0001.json",
        "shards/..%2f..%2f..%2fattempts%2f0001.json",
        "/etc/passwd",
        "shards/weights-00000-of-00001.safetensors%00.txt",
        "",
    ],
)
def test_no_file_outside_the_manifest_is_served(
    api: TestClient, store: MemoryStore, db: Database, job_id: str, checkpoint: str, name: str
) -> None:
    store.put(attempt_key(add_attempt(db, job_id)), b"secret")
    response = api.get(f"/v1/checkpoints/{checkpoint}/files/{name}")
    assert response.status_code == 404
    assert b"secret" not in response.content


@pytest.mark.parametrize("wrong", ["ckpt_01JD3Q8Z6M0000000000000000_s000000040_a0001", "nonsense", "ckpt_%00"])
def test_an_unknown_checkpoint_is_not_found(api: TestClient, wrong: str) -> None:
    for path in ("", "/manifest", f"/files/{SHARD}"):
        assert api.get(f"/v1/checkpoints/{wrong}{path}").status_code == 404


def test_a_deleted_checkpoint_says_when(api: TestClient, db: Database, job_id: str) -> None:
    deleted = add_checkpoint(db, job_id, 20, deleted_at=T0)
    assert api.get(f"/v1/checkpoints/{deleted}").json()["available"] is False
    response = api.get(f"/v1/checkpoints/{deleted}/manifest")
    assert response.status_code == 404
    assert T0.isoformat() in response.json()["detail"]


def test_files_that_vanished_from_the_store_are_a_problem(api: TestClient, store: MemoryStore, checkpoint: str) -> None:
    key = next(key for key in store.objects if key.endswith(SHARD))
    del store.objects[key]
    assert api.get(f"/v1/checkpoints/{checkpoint}/files/{SHARD}").status_code == 404
    damaged = next(key for key in store.objects if key.endswith("manifest.json"))
    store.objects[damaged] = b"{"
    response = api.get(f"/v1/checkpoints/{checkpoint}/manifest")
    assert response.status_code == 503


def test_where_clients_reach_the_store_they_are_sent_there(
    db: Database, store: MemoryStore, settings: Settings, checkpoint: str
) -> None:
    public = settings.model_copy(update={"s3_public": True})
    with TestClient(create_app(public, db, store), follow_redirects=False) as client:
        client.headers["Authorization"] = f"Bearer {ADMIN_TOKEN}"
        response = client.get(f"/v1/checkpoints/{checkpoint}/files/{SHARD}")
    assert response.status_code == 307
    assert SHARD in response.headers["Location"]


def test_exports_are_listed_and_served(api: TestClient, store: MemoryStore, job_id: str) -> None:
    assert api.get(f"/v1/jobs/{job_id}/exports").json() == {"items": []}
    store.put(export_prefix(job_id, "timm") + "model.safetensors", CONTENT)
    store.put(export_prefix(job_id, "timm") + "config.json", b"{}")
    files = [{"name": "config.json", "num_bytes": 2}, {"name": "model.safetensors", "num_bytes": len(CONTENT)}]
    assert api.get(f"/v1/jobs/{job_id}/exports").json() == {"items": [{"format": "timm", "files": files}]}
    path = f"/v1/jobs/{job_id}/exports/timm/files/model.safetensors"
    assert api.get(path, headers={"Range": "bytes=2-3"}).content == CONTENT[2:4]
    for wrong in (
        "timm/files/../../report.json",
        "timm/files/x",
        "../files/model.safetensors",
        "zip/files/config.json",
    ):
        assert api.get(f"/v1/jobs/{job_id}/exports/{wrong}").status_code == 404


def test_a_report_is_served_once_it_is_there(api: TestClient, store: MemoryStore, job_id: str) -> None:
    missing = api.get(f"/v1/jobs/{job_id}/report")
    assert missing.status_code == 404
    assert "QUEUED" in missing.json()["detail"]
    report = EvaluationReport(
        job_id=job_id,
        checkpoint_id="ckpt_x",
        dataset="d",
        split="test",
        num_examples=10,
        metrics={"eval/top1": 0.5},
        created_at=T0,
    )
    store.put(report_key(job_id), report.model_dump_json().encode())
    assert api.get(f"/v1/jobs/{job_id}/report").json()["metrics"] == {"eval/top1": 0.5}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-0", ByteRange(0, 0)),
        ("bytes=5-100", ByteRange(5, 9)),
        ("bytes=-100", ByteRange(0, 9)),
        ("bytes=9-", ByteRange(9, 9)),
        ("bytes=5-4", None),
        ("bytes=0-1,3-4", None),
        ("bytes=-", None),
        ("lines=0-1", None),
        ("bytes=a-b", None),
    ],
)
def test_parse_range(header: str | None, expected: ByteRange | None) -> None:
    assert parse_range(header, 10) == expected


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0), ("bytes=-1", 0)])
def test_ranges_outside_the_file(header: str, size: int) -> None:
    with pytest.raises(RangeNotSatisfiable):
        parse_range(header, size)


@pytest.mark.db
def test_a_pinned_checkpoint_outlives_retention(
    api: TestClient, db: Database, store: MemoryStore, job_id: str, checkpoint: str
) -> None:
    for step in (50, 60, 70, 80):
        add_checkpoint(db, job_id, step)
    path = f"/v1/checkpoints/{checkpoint}"
    assert api.patch(path, json={"pinned": True}).json()["pinned"] is True
    assert api.patch(path, json={"pinned": True}).status_code == 200
    before = len(apply_retention(db, store, job_id, T0))
    assert before > 0
    assert api.get(path).json()["available"] is True
    assert api.patch(path, json={"pinned": False}).json()["pinned"] is False
    assert apply_retention(db, store, job_id, T0) == [checkpoint]
    refused = api.patch(path, json={"pinned": True})
    assert (refused.status_code, refused.json()["detail"]) == (
        409,
        f"Checkpoint {checkpoint} cannot be pinned: it was deleted.",
    )
    events = [event["type"] for event in api.get(f"/v1/jobs/{job_id}/events").json()["items"]]
    assert [type for type in events if "pinned" in type] == ["checkpoint.pinned", "checkpoint.unpinned"]


def test_pinning_takes_a_member_and_a_word(api: TestClient, db: Database, checkpoint: str) -> None:
    path = f"/v1/checkpoints/{checkpoint}"
    assert api.patch(path, json={"pinned": True}, headers=headers_for(db, "viewer")).status_code == 403
    assert api.patch(path, json={}).json()["errors"][0]["pointer"] == "/pinned"
    assert api.patch(f"{path}1", json={"pinned": True}).status_code == 404


@pytest.mark.parametrize("fmt", ["safetensors", "timm", "transformers", "torchvision", "npz"])
def test_exports_of_every_format_are_listed(api: TestClient, store: MemoryStore, job_id: str, fmt: str) -> None:
    store.put(export_prefix(job_id, fmt) + "model.bin", b"weights")
    items = api.get(f"/v1/jobs/{job_id}/exports").json()["items"]
    assert items == [{"format": fmt, "files": [{"name": "model.bin", "num_bytes": 7}]}]
    assert api.get(f"/v1/jobs/{job_id}/exports/{fmt}/files/model.bin").content == b"weights"
