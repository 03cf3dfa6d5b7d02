"""The workers' S3 side against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from orchestrator.embedded.object_store import ObjectStoreServer
from orchestrator.embedded.ports import free_ports
from tests.fakes.dir_store import DirStore
from workers.store import MULTIPART_BYTES, AlreadyExists, NotFound, ObjectStore, S3Store, StorageError


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreServer]:
    server = ObjectStoreServer(tmp_path_factory.mktemp("store"))
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def connect(server: ObjectStoreServer, **changes: str) -> S3Store:
    options = {
        "endpoint": server.endpoint,
        "region": server.region,
        "bucket": server.bucket,
        "prefix": "workers/",
        "access_key": server.access_key,
        "secret_key": server.secret_key,
    }
    return S3Store(**(options | changes))


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.stack)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store: the real one, and the fake that other tests trust."""
    if request.param == "folder":
        return DirStore(tmp_path / "store")
    name = request.node.name.partition("[")[0]
    return connect(request.getfixturevalue("server"), prefix=f"{name}/")


def test_what_is_put_is_got(store: ObjectStore) -> None:
    store.put("a/b", b"one")
    store.put("a/b", memoryview(b"two"))
    assert store.get("a/b") == b"two"


def test_a_missing_object_is_not_found(store: ObjectStore) -> None:
    with pytest.raises(NotFound, match="a/b"):
        store.get("a/b")
    with pytest.raises(NotFound, match="a/b"):
        store.get_range("a/b", 0, 10)
    store.delete(["a/b"])


@pytest.mark.parametrize(("start", "length"), [(0, 3), (4, 4), (8, 100), (10, 5), (3, 0)])
def test_ranges_end_where_the_object_does(store: ObjectStore, start: int, length: int) -> None:
    store.put("digits", b"0123456789")
    assert store.get_range("digits", start, length) == b"0123456789"[start : start + length]


def test_a_conditional_write_has_one_winner(store: ObjectStore) -> None:
    def write(number: int) -> bool:
        try:
            store.put("manifest", str(number).encode(), if_none_match=True)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert store.get("manifest") == str(won.index(True)).encode()


def test_listing_and_deleting(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    store.put_file("x/1", tmp_path / "file")
    store.put("x/2/3", b"")
    store.put("y", b"1")
    assert sorted(store.list("x/")) == [("x/1", 5), ("x/2/3", 0)]
    store.delete(["x/1", "y"])
    assert sorted(store.list("")) == [("x/2/3", 0)]


def test_a_shard_of_several_parts_comes_back_whole(store: ObjectStore) -> None:
    data = np.random.default_rng(0).integers(0, 256, 2 * MULTIPART_BYTES + 12_345, dtype=np.uint8)
    store.put("shard", data.data)
    start = MULTIPART_BYTES - 10
    assert store.get_range("shard", start, 20) == data[start : start + 20].tobytes()
    assert store.get_range("shard", len(data) - 7, 100) == data[-7:].tobytes()
    assert list(store.list("shard")) == [("shard", len(data))]


@pytest.mark.stack
def test_a_store_that_cannot_be_used_is_named_with_the_key(server: ObjectStoreServer) -> None:
    with pytest.raises(StorageError, match=r"cannot write 'a/b'.*"):
        connect(server, secret_key="wrong").put("a/b", b"1")
    (port,) = free_ports(1)
    with pytest.raises(StorageError, match="cannot read 'a/b'"):
        connect(server, endpoint=f"http://127.0.0.1:{port}").get("a/b")
