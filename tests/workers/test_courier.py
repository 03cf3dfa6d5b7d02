"""Shipping node files: nothing lost, nothing twice, no gap in the numbers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.layout import log_chunk_key, logs_prefix
from configs.wire import LogLine
from tests.fakes.dir_store import DirStore
from workers.courier import CHUNK_AGE_S, CHUNK_BYTES, Courier, LogShipment, remove_old_logs
from workers.logs import MAX_LINE_BYTES, log_path, node_log_dir
from workers.store import Data, StorageError

ATTEMPT = "att_01JZZZZZZZZZZZZZZZZZZZZZZZ_0001"
STREAM = "rank-00000"
NODE = "5f" * 28


class FlakyStore(DirStore):
    """Fails, or loses the reply to, the next puts."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.failures = 0
        self.lost_replies = 0

    def put(self, key: str, data: Data, *, if_none_match: bool = False) -> None:
        if self.failures:
            self.failures -= 1
            raise StorageError("away")
        super().put(key, data, if_none_match=if_none_match)
        if self.lost_replies:
            self.lost_replies -= 1
            raise StorageError("reply lost")


@pytest.fixture
def store(tmp_path: Path) -> FlakyStore:
    return FlakyStore(tmp_path / "store")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = log_path(node_log_dir(tmp_path / "logs", ATTEMPT, NODE), STREAM)
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def chunks(store: DirStore, stream: str = STREAM) -> list[list[str]]:
    """Messages of each chunk; the numbers must have no gap."""
    keys = sorted(key for key, _ in store.list(f"{logs_prefix(ATTEMPT)}{stream}/"))
    assert keys == [log_chunk_key(ATTEMPT, stream, n) for n in range(len(keys))]
    return [[LogLine.model_validate_json(raw).msg for raw in store.get(key).splitlines()] for key in keys]


def poll(look: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_lines_wait_until_they_are_old_enough(path: Path, store: FlakyStore) -> None:
    shipment = LogShipment(path, ATTEMPT, store)
    append(path, "one\n")
    shipment.ship(now=100.0)
    assert chunks(store) == []
    append(path, "two\n")
    shipment.ship(now=100.0 + CHUNK_AGE_S)
    assert chunks(store) == [["one", "two"]]
    append(path, "three\n")
    shipment.ship(now=103.0)
    assert chunks(store) == [["one", "two"]], "the next chunk's age counts from its first line"


def test_full_chunks_go_at_once(path: Path, store: FlakyStore) -> None:
    line = "x" * 1000 + "\n"
    append(path, line * (3 * CHUNK_BYTES // len(line)))
    LogShipment(path, ATTEMPT, store).ship(now=0.0)
    assert [len(chunk) >= CHUNK_BYTES // len(line) for chunk in chunks(store)] == [True, True]


def test_an_unended_line_is_shipped_at_the_end_only(path: Path, store: FlakyStore) -> None:
    shipment = LogShipment(path, ATTEMPT, store)
    append(path, "whole\nhalf")
    shipment.ship(now=0.0)
    shipment.ship(now=CHUNK_AGE_S)
    assert chunks(store) == [["whole"]]
    shipment.ship(now=CHUNK_AGE_S, final=True)
    assert chunks(store) == [["whole"], ["half"]]


def test_a_new_courier_goes_on_after_the_last_chunk(path: Path, store: FlakyStore) -> None:
    append(path, "one\n")
    LogShipment(path, ATTEMPT, store).ship(now=0.0, final=True)
    append(path, "two\n")
    LogShipment(path, ATTEMPT, store).ship(now=0.0, final=True)
    assert chunks(store) == [["one"], ["two"]]


def test_a_lost_reply_ships_nothing_twice(path: Path, store: FlakyStore) -> None:
    append(path, "one\n")
    store.lost_replies = 1
    with pytest.raises(StorageError):
        LogShipment(path, ATTEMPT, store).ship(now=0.0, final=True)
    append(path, "two\n")
    LogShipment(path, ATTEMPT, store).ship(now=0.0, final=True)
    assert chunks(store) == [["one"], ["two"]]


def test_a_stranger_in_the_way_is_passed_by(path: Path, store: FlakyStore) -> None:
    append(path, "theirs\n")
    LogShipment(path, ATTEMPT, store).ship(now=0.0, final=True)
    path.write_text("ours\n")
    path.with_suffix(".shipped").unlink()  # another disk, the same stream
    LogShipment(path, ATTEMPT, store).ship(now=0.0, final=True)
    assert chunks(store) == [["theirs"], ["ours"]]


def test_a_broken_note_is_as_good_as_none(path: Path, store: FlakyStore) -> None:
    append(path, "one\n")
    LogShipment(path, ATTEMPT, store).ship(now=0.0, final=True)
    path.with_suffix(".shipped").write_text("{")
    LogShipment(path, ATTEMPT, store).ship(now=0.0, final=True)
    assert chunks(store) == [["one"]]


def test_long_and_binary_lines(path: Path, store: FlakyStore) -> None:
    with path.open("ab") as file:
        file.write(b"a" * (MAX_LINE_BYTES + 5) + b"\n\x1b[1mbold\x1b[0m \xff\n 1%\r 2%\r\nend\n")
    LogShipment(path, ATTEMPT, store).ship(now=0.0, final=True)
    [[long, bold, bar, end]] = chunks(store)
    assert long.endswith("… [5 more bytes cut]")
    assert (bold, bar, end) == ("bold �", " 2%", "end")


def test_a_line_that_never_ends_is_cut_and_does_not_stall(path: Path, store: FlakyStore) -> None:
    with path.open("ab") as file:
        file.write(b"z" * (3 * 1024 * 1024))
    shipment = LogShipment(path, ATTEMPT, store)
    shipment.ship(now=0.0)
    shipment.ship(now=CHUNK_AGE_S)
    assert len(chunks(store)) >= 2


def test_courier_ships_every_stream_and_outlives_a_store_that_is_away(path: Path, store: FlakyStore) -> None:
    store.failures = 1
    append(path, "rank\n")
    (path.parent / "driver.log").write_text("driver\n")
    courier = Courier(ATTEMPT, path.parents[2], NODE, store)
    try:
        assert courier.flush(20.0)
        assert (chunks(store), chunks(store, "driver")) == ([["rank"]], [["driver"]])
        append(path, "later\n")
        poll(lambda: len(chunks(store)) == 2)
        assert courier.last_lines(STREAM, 5) == ("rank", "later")
    finally:
        courier.close()


def test_flush_gives_up_in_time(path: Path, store: FlakyStore) -> None:
    store.failures = 1_000_000
    append(path, "one\n")
    courier = Courier(ATTEMPT, path.parents[2], NODE, store)
    started = time.monotonic()
    assert not courier.flush(0.5)
    assert time.monotonic() - started < 5.0
    courier.close()


def test_old_logs_are_removed(path: Path) -> None:
    kept = log_path(node_log_dir(path.parents[2], "att_01JYYYYYYYYYYYYYYYYYYYYYYY_0001", NODE), "driver")
    kept.parent.mkdir(parents=True)
    kept.touch()
    for old in (path, path.parent):
        os.utime(old, (time.time() - 100, time.time() - 100))
    remove_old_logs(path.parents[2], keep_s=50.0)
    assert not path.parents[1].exists()
    assert kept.exists()


def test_note_is_small(path: Path, store: FlakyStore) -> None:
    append(path, "one\n")
    LogShipment(path, ATTEMPT, store).ship(now=0.0, final=True)
    assert json.loads(path.with_suffix(".shipped").read_text()) == {"offset": 4, "chunk": 1}
