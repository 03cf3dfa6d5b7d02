"""Fetching weights: verified, resumed, never half of a model."""

from __future__ import annotations

import errno
import json
import threading
from datetime import UTC, datetime
from pathlib import Path

import google_crc32c
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

import vit
from configs.model import VitConfig
from configs.wire import BLOCK_BYTES, Manifest, Preprocess, ShardFile, TensorSlice
from orchestrator import fetch as fetch_module
from orchestrator.client import Client
from orchestrator.fetch import CONFIG_NAME, WEIGHTS_NAME, FetchError, fetch
from orchestrator.weights_file import WeightsFile

CHECKPOINT = "ckpt_01ARZ3NDEKTSV4RRFFQ69G5FAV_s000000010_a0001"
JOB = "job_01ARZ3NDEKTSV4RRFFQ69G5FAV"
# 21 MB of weights in two shards: several blocks, the last of each short.
CONFIG = VitConfig(
    patch_size=8, embed_dim=384, depth=3, num_heads=6, mlp_dim=1536, image_size=(32, 32), in_channels=1, num_classes=10
)


class Server:
    """A checkpoint behind the API's routes, with the faults a test asks for."""

    def __init__(self, weights: dict[str, NDArray[np.float32]]) -> None:
        self.weights = weights
        self.files, shards = {}, []
        for rank, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
            data, slices = _shard(weights, names)
            name = f"shards/weights-{rank:05d}-of-00002.safetensors"
            self.files[name] = bytearray(data)
            shards.append(_describe(name, rank, "weights", data, slices))
        shards.append(_describe("shards/optimizer-00000-of-00001.safetensors", 0, "optimizer", b"\0" * 64, ()))
        self.manifest = _manifest(weights, tuple(shards))
        self.ranges: list[tuple[str, int]] = []
        self.fail_after: int | None = None
        self.ignores_range = False
        self._lock = threading.Lock()

    def client(self) -> Client:
        return Client("http://patchwork.test", "t", transport=httpx.MockTransport(self.handle))

    def handle(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == f"/v1/checkpoints/{CHECKPOINT}":
            return httpx.Response(200, json=self.public())
        if path == f"/v1/jobs/{JOB}/checkpoints":
            return httpx.Response(200, json={"items": [self.public()]})
        if path.endswith("/manifest"):
            return httpx.Response(200, text=self.manifest.model_dump_json())
        name = path.partition("/files/")[2]
        start, end = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
        if (start, end) == (0, 0):
            # Asked only where the bytes come from.
            return httpx.Response(206, content=bytes(self.files[name][:1]))
        with self._lock:
            if self.fail_after is not None and len(self.ranges) >= self.fail_after:
                raise httpx.ConnectError("cut")
            self.ranges.append((name, start))
        if self.ignores_range:
            return httpx.Response(200, content=bytes(self.files[name]))
        return httpx.Response(206, content=bytes(self.files[name][start : end + 1]))

    def public(self) -> dict[str, object]:
        return {
            "id": CHECKPOINT,
            "job_id": JOB,
            "attempt": 1,
            "step": 10,
            "num_bytes": 1,
            "metrics": {},
            "model": CONFIG.model_dump(mode="json"),
            "preprocess": self.manifest.preprocess.model_dump(mode="json"),
            "aliases": ["best", "latest"],
            "available": True,
            "pinned": False,
            "deleted_at": None,
            "created_at": "2026-01-01T00:00:00Z",
        }

    @property
    def num_blocks(self) -> int:
        return sum(len(f.crc32c) for f in self.manifest.files if f.role == "weights")


def _shard(weights: dict[str, NDArray[np.float32]], names: list[str]) -> tuple[bytes, tuple[TensorSlice, ...]]:
    """Every named tensor in two runs, as ranks with ZeRO write them, in a safetensors file."""
    header, slices, body, position = {}, [], b"", 0
    for name in names:
        flat = weights[name].ravel()
        half = len(flat) // 3
        for start, run in ((0, flat[:half]), (half, flat[half:])):
            if len(run):
                key = f"weight/{name}/{start}"
                header[key] = {"dtype": "F32", "shape": [len(run)], "data_offsets": [position, position + run.nbytes]}
                slices.append(TensorSlice(key=key, name=name, kind="weight", start=start, numel=len(run)))
                body += run.tobytes()
                position += run.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body, tuple(slices)


def _describe(name: str, rank: int, role: str, data: bytes, slices: tuple[TensorSlice, ...]) -> ShardFile:
    blocks = tuple(google_crc32c.value(data[i : i + BLOCK_BYTES]) for i in range(0, len(data), BLOCK_BYTES))
    return ShardFile.model_validate(
        {"name": name, "rank": rank, "role": role, "num_bytes": len(data), "crc32c": blocks, "slices": slices}
    )


def _manifest(weights: dict[str, NDArray[np.float32]], files: tuple[ShardFile, ...]) -> Manifest:
    return Manifest(
        checkpoint_id=CHECKPOINT,
        job_id=JOB,
        attempt=1,
        step=10,
        position=1280,
        total_steps=10,
        world_size=2,
        zero_stage=1,
        optimizer="adamw",
        optimizer_step=10,
        spec_hash="sha256:0",
        training_fingerprint="sha256:0",
        data_fingerprint="sha256:0",
        versions={},
        metrics={"eval/top1": 0.5},
        model=CONFIG,
        preprocess=Preprocess(image_size=(32, 32), in_channels=1, mean=(0.5,), std=(0.5,)),
        tensors={name: value.shape for name, value in weights.items()},
        files=files,
        nonce="n",
        created_at=datetime.now(UTC),
    )


@pytest.fixture(scope="module")
def weights() -> dict[str, NDArray[np.float32]]:
    return {name: value.numpy() for name, value in vit.build(CONFIG, seed=3).state_dict().items()}


@pytest.fixture
def server(weights: dict[str, NDArray[np.float32]]) -> Server:
    return Server(weights)


def test_what_arrives_is_the_model(server: Server, tmp_path: Path) -> None:
    told: list[int] = []
    fetched = fetch(server.client(), f"{JOB}/best", tmp_path / "model", on_bytes=told.append)
    state = vit.load(tmp_path / "model").state_dict()
    assert state.keys() == server.weights.keys()
    assert all(np.array_equal(state[name].numpy(), value) for name, value in server.weights.items())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert json.loads((tmp_path / "model" / CONFIG_NAME).read_text())["checkpoint_id"] == CHECKPOINT
    assert fetched.num_parameters == sum(value.size for value in server.weights.values())
    assert sum(told) == fetched.num_bytes == fetched.num_bytes_read > 2 * BLOCK_BYTES
    assert all("optimizer" not in name for name, _ in server.ranges)


def test_a_moving_average_is_fetched_by_its_role(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"no moving average"):
        fetch(server.client(), f"{JOB}/best", tmp_path / "none", weights="ema")
    files = tuple(
        file.model_copy(update={"role": "ema" if file.role == "weights" else "weights"})
        for file in server.manifest.files
        if file.role in ("weights", "optimizer")
    )
    server.manifest = server.manifest.model_copy(update={"files": files})
    fetch(server.client(), f"{JOB}/best", tmp_path / "ema", weights="ema")
    state = vit.load(tmp_path / "ema").state_dict()
    assert all(np.array_equal(state[name].numpy(), value) for name, value in server.weights.items())


def test_a_cut_fetch_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.fail_after = 1
    with pytest.raises(FetchError, match="cut"):
        fetch(server.client(), CHECKPOINT, tmp_path / "model", num_threads=1)
    assert not (tmp_path / "model" / CONFIG_NAME).exists()
    (first,) = server.ranges
    server.fail_after, server.ranges = None, []
    fetched = fetch(server.client(), CHECKPOINT, tmp_path / "model")
    assert first not in server.ranges
    assert len(server.ranges) == server.num_blocks - 1
    kept = min(BLOCK_BYTES, len(server.files[first[0]]) - first[1])
    assert fetched.num_bytes_read == fetched.num_bytes - kept
    vit.load(tmp_path / "model")


def test_a_flipped_byte_is_refused_by_name_and_nothing_is_published(server: Server, tmp_path: Path) -> None:
    name = sorted(server.files)[1]
    server.files[name][BLOCK_BYTES + 5] ^= 1
    with pytest.raises(FetchError, match=rf"bytes {BLOCK_BYTES} to .* of {name} .* do not match its checksum"):
        fetch(server.client(), CHECKPOINT, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == [f".parts-{CHECKPOINT}"]


@pytest.mark.parametrize("of_a_weight", [True, False], ids=["of a weight", "of a shard's header"])
def test_a_flipped_byte_on_disk_is_read_again(server: Server, tmp_path: Path, of_a_weight: bool) -> None:
    server.fail_after = server.num_blocks - 1
    with pytest.raises(FetchError):
        fetch(server.client(), CHECKPOINT, tmp_path / "model", num_threads=1)
    part = tmp_path / "model" / f".parts-{CHECKPOINT}" / (WEIGHTS_NAME if of_a_weight else "00000.rest")
    with part.open("r+b") as file:
        # The first tensor begins behind the header, and lies in the first block of the first shard.
        file.seek(8 + int.from_bytes(file.read(8), "little") + 100 if of_a_weight else 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    server.fail_after, server.ranges = None, []
    fetch(server.client(), CHECKPOINT, tmp_path / "model")
    assert (sorted(server.files)[0], 0) in server.ranges
    assert len(server.ranges) == 2
    vit.load(tmp_path / "model")


def test_runs_that_overlap_are_no_fault(server: Server, tmp_path: Path) -> None:
    """A shard that holds a whole tensor beside the one that holds a part of it."""
    name = sorted(server.weights)[0]
    data, _ = _shard(server.weights, [name])
    flat = server.weights[name].ravel()
    whole = TensorSlice(key=name, name=name, kind="weight", start=0, numel=flat.size)
    data = data[: -flat.nbytes] + flat.tobytes()
    extra = _describe("shards/weights-00002-of-00003.safetensors", 2, "weights", data, (whole,))
    server.files[extra.name] = bytearray(data)
    server.manifest = server.manifest.model_copy(update={"files": (*server.manifest.files, extra)})
    fetch(server.client(), CHECKPOINT, tmp_path / "model")
    state = vit.load(tmp_path / "model").state_dict()
    assert all(np.array_equal(state[key].numpy(), value) for key, value in server.weights.items())


def test_the_store_is_asked_where_a_redirect_led_until_that_address_expires(server: Server, tmp_path: Path) -> None:
    asked: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.host == "store.test":
            assert "Authorization" not in request.headers
            if asked[-1] == "store.test" and "expired" not in asked:
                asked.append("expired")
                return httpx.Response(403)
            asked.append("store.test")
            return server.handle(request)
        if "/files/" in request.url.path:
            assert request.headers["Authorization"] == "Bearer t"
            asked.append("patchwork.test")
            return httpx.Response(307, headers={"Location": str(request.url.copy_with(host="store.test"))})
        return server.handle(request)

    client = Client("http://patchwork.test", "t", transport=httpx.MockTransport(handle))
    fetch(client, CHECKPOINT, tmp_path / "model", num_threads=1)
    # Once for each of the two shards, and once more when the address was not good any longer.
    assert (asked.count("patchwork.test"), asked.count("expired")) == (3, 1)
    vit.load(tmp_path / "model")


def test_a_disk_that_fails_while_blocks_come_in_fails_the_fetch(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so once; at the sync in the end it is silent."""

    def fails(_: WeightsFile) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fetch_module, "_SYNC_BYTES", 1)
    monkeypatch.setattr(WeightsFile, "sync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        fetch(server.client(), CHECKPOINT, tmp_path)
    assert not (tmp_path / CONFIG_NAME).exists()


def test_a_server_that_ignores_ranges_is_refused(server: Server, tmp_path: Path) -> None:
    server.ignores_range = True
    with pytest.raises(FetchError, match="do not match its checksum"):
        fetch(server.client(), CHECKPOINT, tmp_path / "model")


def test_a_model_that_is_there_is_not_replaced_unless_asked(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    fetch(server.client(), CHECKPOINT, folder)
    server.ranges = []
    with pytest.raises(FileExistsError, match="--force"):
        fetch(server.client(), CHECKPOINT, folder)
    assert server.ranges == []
    (folder / WEIGHTS_NAME).write_bytes(b"something else")
    fetch(server.client(), CHECKPOINT, folder, force=True)
    vit.load(folder)


def test_shards_with_a_gap_are_refused(server: Server, tmp_path: Path) -> None:
    name = server.manifest.files[0].slices[-1].name
    server.manifest = server.manifest.model_copy(
        update={"tensors": {**server.manifest.tensors, name: (server.weights[name].size + 1,)}}
    )
    with pytest.raises(FetchError, match=f"elements of {name}"):
        fetch(server.client(), CHECKPOINT, tmp_path / "model")
    assert not (tmp_path / "model" / WEIGHTS_NAME).exists()


def test_a_job_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    client = Client("http://p.test", transport=httpx.MockTransport(lambda _: httpx.Response(200, json={"items": []})))
    with pytest.raises(LookupError, match="has no finished checkpoint"):
        fetch(client, JOB, tmp_path / "model")
