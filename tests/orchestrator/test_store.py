"""The control plane's S3 side against a real server, and its fake against the same tests."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from orchestrator.embedded.object_store import ObjectStoreServer
from orchestrator.embedded.ports import free_ports
from orchestrator.storage.store import (
    CHUNK_BYTES,
    AlreadyExists,
    NotFound,
    ObjectStore,
    S3Store,
    StoreRefused,
    StoreUnavailable,
)
from tests.fakes.memory_store import MemoryStore


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
        "prefix": "team-a/",
        "access_key": server.access_key,
        "secret_key": server.secret_key,
    }
    return S3Store(**(options | changes))


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.stack)])
def any_store(request: pytest.FixtureRequest) -> ObjectStore:
    """An empty store: each test uses keys of its own below `prefix`."""
    if request.param == "memory":
        return MemoryStore()
    name = request.node.name.partition("[")[0]
    return connect(request.getfixturevalue("server"), prefix=f"{name}/")


@pytest.fixture
def s3(server: ObjectStoreServer) -> S3Store:
    return connect(server)


def test_what_is_put_is_got(any_store: ObjectStore) -> None:
    any_store.put("a/b", b"one")
    any_store.put("a/b", b"two")
    assert any_store.get("a/b") == b"two"
    assert any_store.head("a/b") == ("a/b", 3)


def test_a_missing_key_is_not_found(any_store: ObjectStore) -> None:
    for look in (any_store.get, any_store.head, any_store.stream):
        with pytest.raises(NotFound, match="nowhere"):
            look("nowhere")
    assert list(any_store.list("nowhere/")) == []
    assert any_store.folders("nowhere/") == ()
    any_store.delete(["nowhere"])
    any_store.delete([])


def test_a_conditional_put_wins_once(any_store: ObjectStore) -> None:
    any_store.put("once", b"first", if_none_match=True)
    with pytest.raises(AlreadyExists, match="once"):
        any_store.put("once", b"second", if_none_match=True)
    assert any_store.get("once") == b"first"


def test_racing_conditional_puts_have_one_winner(any_store: ObjectStore) -> None:
    def contend(name: int) -> bool:
        try:
            any_store.put("race", bytes([name]), if_none_match=True)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(contend, range(6)))
    assert sum(won) == 1
    assert any_store.get("race") == bytes([won.index(True)])


def test_listing_and_folders(any_store: ObjectStore) -> None:
    for key in ("j/1/a", "j/1/b/c", "j/2/a", "j/file", "jj/3/a"):
        any_store.put(key, b"x" * len(key))
    assert sorted(any_store.list("j/")) == [("j/1/a", 5), ("j/1/b/c", 7), ("j/2/a", 5), ("j/file", 6)]
    assert any_store.folders("j/") == ("j/1/", "j/2/")
    any_store.delete(["j/1/a", "j/1/b/c"])
    assert sorted(any_store.list("j/")) == [("j/2/a", 5), ("j/file", 6)]
    assert "j/2/" in any_store.folders("j/")


@pytest.mark.parametrize(("start", "length"), [(0, None), (0, 10), (CHUNK_BYTES - 1, 3), (5, None), (0, 0)])
def test_streams_give_exactly_the_range(any_store: ObjectStore, start: int, length: int | None) -> None:
    data = bytes(range(256)) * (CHUNK_BYTES // 128)
    any_store.put("big", data)
    chunks = list(any_store.stream("big", start, length))
    assert b"".join(chunks) == data[start : len(data) if length is None else start + length]
    assert all(len(chunk) <= CHUNK_BYTES for chunk in chunks)


@pytest.mark.stack
def test_more_keys_than_one_page(s3: S3Store) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: s3.put(f"many/{i:05d}/x", b""), range(1100)))
    assert len(list(s3.list("many/"))) == 1100
    assert len(s3.folders("many/")) == 1100
    s3.delete(item.key for item in s3.list("many/"))
    assert list(s3.list("many/")) == []


@pytest.mark.stack
def test_the_self_test_passes_and_leaves_nothing(s3: S3Store) -> None:
    s3.self_test()
    assert list(s3.list("self-test/")) == []


@pytest.mark.stack
def test_a_bucket_is_created_once(server: ObjectStoreServer) -> None:
    store = connect(server, bucket="another-bucket")
    with pytest.raises(NotFound):
        store.put("key", b"")
    store.create_bucket()
    store.create_bucket()
    store.put("key", b"")


@pytest.mark.stack
def test_a_presigned_url_gives_this_object_and_no_other(s3: S3Store) -> None:
    s3.put("shown", b"hello")
    s3.put("hidden", b"secret")
    url = s3.presign("shown", 60)
    assert httpx.get(url).content == b"hello"
    assert httpx.get(url.replace("shown", "hidden")).status_code == 403
    assert httpx.get(url, headers={"Range": "bytes=1-2"}).content == b"el"


@pytest.mark.stack
def test_prefixes_do_not_meet(server: ObjectStoreServer, s3: S3Store) -> None:
    other = connect(server, prefix="team-b/")
    s3.put("shared-name", b"a")
    with pytest.raises(NotFound):
        other.get("shared-name")
    assert connect(server, prefix="").get("team-a/shared-name") == b"a"


@pytest.mark.stack
def test_wrong_credentials_are_refused_not_unavailable(server: ObjectStoreServer) -> None:
    with pytest.raises(StoreRefused, match="key"):
        connect(server, secret_key="wrong").put("key", b"")


def test_a_store_that_is_away_is_unavailable() -> None:
    (port,) = free_ports(1)
    store = S3Store(
        endpoint=f"http://127.0.0.1:{port}", region="us-east-1", bucket="b", prefix="", access_key="a", secret_key="s"
    )
    with pytest.raises(StoreUnavailable, match="some/key"):
        store.get("some/key")
