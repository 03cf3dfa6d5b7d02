"""The driver's line to the control plane: claim, reports, what waits on disk, and orders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from configs.states import Desired
from configs.wire import ClaimRequest, Heartbeat, MetricPoint, ReportBatch, WorkerEvent, to_columns
from tests.fakes.control_plane import SECRET, FakeControlPlane
from workers.control_plane import ControlPlane, Spool, Superseded, Unreachable
from workers.forwarder import MAX_METRICS_PER_BATCH, Forwarder
from workers.hub import Drained

ATTEMPT = "att_01JZZZZZZZZZZZZZZZZZZZZZZZ_0001"
NOW = datetime.now(UTC)


@pytest.fixture
def server() -> Iterator[FakeControlPlane]:
    server = FakeControlPlane()
    yield server
    server.go_away()


def claim(nonce: str = "nonce-0001") -> ClaimRequest:
    return ClaimRequest(nonce=nonce, node="n", pid=1)


def client(server: FakeControlPlane, secret: str = SECRET) -> ControlPlane:
    return ControlPlane(server.url, secret, ATTEMPT, timeout_s=5.0)


def forwarder(server: FakeControlPlane, directory: Path, nonce: str = "nonce-0001") -> Forwarder:
    return Forwarder(client(server), claim(nonce), directory / "spool", total_steps=100, interval_s=0.05)


def metrics(first: int, count: int) -> tuple[MetricPoint, ...]:
    return tuple(MetricPoint(name="train/loss", step=first + i, value=1.0, at=NOW) for i in range(count))


def drained(step: int, num_metrics: int = 1) -> Drained:
    beat = Heartbeat(rank=0, node="n", pid=1, phase="training", step=step, at=NOW)
    event = WorkerEvent(type="note", message=str(step), at=NOW)
    return Drained(
        heartbeats={0: beat}, metrics=metrics(step, num_metrics), events=(event,), checkpoints=(f"ckpt_{step}",)
    )


def poll(look: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_claim_is_taken_once_but_the_same_driver_may_ask_again(server: FakeControlPlane) -> None:
    server.attempt(ATTEMPT).desired = Desired.PAUSE
    assert client(server).claim(claim()).desired is Desired.PAUSE
    assert client(server).claim(claim()).desired is Desired.PAUSE
    with pytest.raises(Superseded):
        client(server).claim(claim("another-driver"))


def test_wrong_secret_is_no_verdict(server: FakeControlPlane) -> None:
    with pytest.raises(Unreachable, match="401"):
        client(server, "guess").claim(claim())


def test_silence_and_refused_connections_are_unreachable(server: FakeControlPlane) -> None:
    server.go_away()
    with pytest.raises(Unreachable):
        client(server).report(ReportBatch(seq=1))


def test_reports_arrive_and_orders_come_back(server: FakeControlPlane, tmp_path: Path) -> None:
    line = forwarder(server, tmp_path)
    line.claim(5.0)
    line.start()
    line.put(drained(7))
    attempt = server.attempt(ATTEMPT)
    poll(lambda: attempt.last_step == 7)
    attempt.desired = Desired.STOP
    poll(lambda: line.desired is Desired.STOP)
    assert line.finish(10.0)
    assert attempt.is_finished
    assert attempt.values("train/loss") == {7: 1.0}
    assert attempt.checkpoints == ["ckpt_7"]
    assert attempt.order == sorted(attempt.order)
    assert all(batch.total_steps == 100 for batch in attempt.batches.values())


def test_reports_wait_on_disk_and_are_replayed_in_order(server: FakeControlPlane, tmp_path: Path) -> None:
    line = forwarder(server, tmp_path)
    line.claim(5.0)
    line.start()
    server.go_away()
    line.put(drained(1))
    poll(lambda: any((tmp_path / "spool").glob("*.json")))
    for step in range(2, 6):
        line.put(drained(step))
    server.come_back()
    attempt = server.attempt(ATTEMPT)
    poll(lambda: len(attempt.values("train/loss")) == 5)
    assert line.finish(10.0)
    assert attempt.order == sorted(set(attempt.order)), "in order, and none twice"
    assert attempt.checkpoints == [f"ckpt_{step}" for step in range(1, 6)]
    assert not list((tmp_path / "spool").glob("*.json"))


def test_training_starts_without_a_control_plane_and_is_claimed_later(server: FakeControlPlane, tmp_path: Path) -> None:
    server.go_away()
    line = forwarder(server, tmp_path)
    line.claim(0.2)
    assert (line.is_fenced, line.is_reachable, line.desired) == (False, False, Desired.RUN)
    line.start()
    line.put(drained(1))
    server.come_back()
    poll(lambda: server.attempt(ATTEMPT).last_step == 1)
    assert len(server.attempt(ATTEMPT).claims) == 1
    assert line.finish(10.0)


def test_a_second_driver_is_fenced_off(server: FakeControlPlane, tmp_path: Path) -> None:
    forwarder(server, tmp_path / "a").claim(5.0)
    second = forwarder(server, tmp_path / "b", nonce="second-driver")
    second.claim(5.0)
    assert second.is_fenced


def test_superseded_while_training_fences(server: FakeControlPlane, tmp_path: Path) -> None:
    line = forwarder(server, tmp_path)
    line.claim(5.0)
    line.start()
    server.attempt(ATTEMPT).superseded = True
    poll(lambda: line.is_fenced)
    assert line.finish(5.0), "nothing more is sent"


def test_large_reports_are_split_and_only_the_last_is_finished(server: FakeControlPlane, tmp_path: Path) -> None:
    line = forwarder(server, tmp_path)
    line.claim(5.0)
    line.put(drained(0, num_metrics=2 * MAX_METRICS_PER_BATCH + 10))
    line.start()
    assert line.finish(10.0)
    attempt = server.attempt(ATTEMPT)
    assert len(attempt.values("train/loss")) == 2 * MAX_METRICS_PER_BATCH + 10
    assert max(batch.num_points for batch in attempt.batches.values()) == MAX_METRICS_PER_BATCH
    assert [batch.finished for _, batch in sorted(attempt.batches.items())].count(True) == 1
    assert attempt.batches[max(attempt.batches)].finished


def test_finish_without_a_control_plane_gives_up_in_time(server: FakeControlPlane, tmp_path: Path) -> None:
    server.go_away()
    line = forwarder(server, tmp_path)
    line.start()
    line.put(drained(1))
    started = time.monotonic()
    assert not line.finish(1.0)
    assert time.monotonic() - started < 8.0


def test_spool_survives_its_process(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for seq in (1, 2):
        spool.add(ReportBatch(seq=seq, metrics=metrics(seq, 1)))
    again = Spool(tmp_path)
    assert len(again) == 2
    first = again.first()
    assert first is not None
    assert first.seq == 1
    again.remove(1)
    assert [path.name for path in tmp_path.iterdir()] == ["0000000002.json"]


def test_an_answer_that_cannot_be_read_is_none(server: FakeControlPlane, tmp_path: Path) -> None:
    line = forwarder(server, tmp_path)
    line.claim(5.0)
    line.start()
    server.says_nonsense = True
    line.put(drained(1))
    poll(lambda: any((tmp_path / "spool").glob("*.json")))
    assert not line.is_reachable
    server.says_nonsense = False
    attempt = server.attempt(ATTEMPT)
    poll(lambda: attempt.values("train/loss") == {1: 1.0})
    assert line.finish(10.0)
    assert attempt.checkpoints == ["ckpt_1"]


def test_what_a_full_disk_does_not_take_waits_in_memory(server: FakeControlPlane, tmp_path: Path) -> None:
    line = forwarder(server, tmp_path)
    line.claim(5.0)
    line.start()
    server.go_away()
    # A folder where a file should be: writing fails, also for root, as on a full disk.
    spool = tmp_path / "spool"
    for seq in range(1, 4000):
        (spool / f"{seq}.new").mkdir()
    for step in range(1, 4):
        line.put(drained(step))
        poll(lambda: not line.is_reachable)
    server.come_back()
    attempt = server.attempt(ATTEMPT)
    poll(lambda: len(attempt.values("train/loss")) == 3)
    assert line.finish(10.0)
    assert attempt.order == sorted(set(attempt.order))
    assert attempt.checkpoints == [f"ckpt_{step}" for step in range(1, 4)]
    assert not list(spool.glob("*.json"))


def test_spool_keeps_its_order_and_its_bound_between_disk_and_memory(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=20_000)
    spool.add(ReportBatch(seq=1, metrics=metrics(0, 100), checkpoints=("ckpt_1",)))
    (tmp_path / "2.new").mkdir()
    spool.add(ReportBatch(seq=2, metrics=metrics(0, 100), checkpoints=("ckpt_2",)))
    spool.add(ReportBatch(seq=3, metrics=metrics(0, 100), checkpoints=("ckpt_3",)))
    found = []
    while (batch := spool.first()) is not None:
        found.append(batch)
        spool.remove(batch.seq)
    assert [batch.checkpoints for batch in found] == [("ckpt_1",), ("ckpt_2",), ("ckpt_3",)]
    assert found[0].num_points < found[2].num_points == 100
    assert sum(len(batch.model_dump_json()) for batch in found) <= 20_000


def test_a_spooled_report_that_cannot_be_read_holds_nobody_up(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for seq in (1, 2):
        spool.add(ReportBatch(seq=seq))
    (tmp_path / "0000000001.json").write_bytes(b'{"seq":')
    first = spool.first()
    assert first is not None
    assert (first.seq, len(spool)) == (2, 1)


def test_a_spool_that_is_far_too_large_holds_no_metrics_in_the_end(tmp_path: Path) -> None:
    event = WorkerEvent(type="note", message="kept", at=NOW)
    spool = Spool(tmp_path, max_bytes=1)
    spool.add(ReportBatch(seq=1, columns=to_columns(metrics(0, 7)), metrics=tuple(metrics(7, 2)), events=(event,)))
    first = spool.first()
    assert first is not None
    assert (first.num_points, len(first.events)) == (0, 1)


def test_spool_is_bounded_and_thins_the_oldest_metrics_only(tmp_path: Path) -> None:
    event = WorkerEvent(type="note", message="kept", at=NOW)
    spool = Spool(tmp_path, max_bytes=40_000)
    for seq in range(1, 21):
        spool.add(
            ReportBatch(seq=seq, columns=to_columns(metrics(0, 100)), events=(event,), checkpoints=(f"ckpt_{seq}",))
        )
    stored = [ReportBatch.model_validate_json(path.read_bytes()) for path in sorted(tmp_path.glob("*.json"))]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.json")) <= 40_000
    assert len(stored) == 20
    assert all(batch.events and batch.checkpoints for batch in stored)
    assert stored[0].num_points < stored[-1].num_points == 100
