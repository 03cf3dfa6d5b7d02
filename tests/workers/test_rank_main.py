"""A rank's side of the hub: what is told, what is lost when the hub stumbles (nothing), and how a rank ends."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from configs.reasons import ExitReason
from configs.states import Desired
from configs.wire import AttemptFile
from workers.diagnosis import RankEnd
from workers.hub import Drained, Push, RankInfo, ReportHub
from workers.node import NodeSettings
from workers.rank_main import HubLost, RankReporter, run

INFO = RankInfo(0, "node-id", "host", 42)


class StumblingHub(ReportHub):
    """Fails the next pushes, or is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.is_gone = False

    def push(self, push: Push) -> Desired:
        if self.is_gone:
            raise HubLost("gone")
        if self.failures:
            self.failures -= 1
            raise TimeoutError
        return super().push(push)


def never() -> None:
    raise AssertionError("the hub is not lost")


def poll(look: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def collect(hub: ReportHub, reporter: RankReporter) -> Drained:
    reporter.close()
    return hub.drain(Desired.RUN)


def test_everything_told_arrives() -> None:
    hub = StumblingHub()
    reporter = RankReporter(hub, INFO, never, interval_s=0.02)
    reporter.heartbeat("training", 3)
    reporter.metric("train/loss", 3, 0.25)
    reporter.metric("train/grad_norm", 3, math.inf)
    reporter.event("note", "hello", {"a": 1})
    reporter.checkpoint("ckpt_x")
    drained = collect(hub, reporter)
    assert [(m.name, m.value) for m in drained.metrics] == [("train/loss", 0.25), ("train/grad_norm", None)]
    assert [(e.type, e.data) for e in drained.events] == [("note", {"a": 1})]
    assert drained.checkpoints == ("ckpt_x",)
    assert (drained.heartbeats[0].phase, drained.heartbeats[0].step) == ("training", 3)


def test_failed_pushes_are_repeated() -> None:
    hub = StumblingHub()
    hub.failures = 3
    reporter = RankReporter(hub, INFO, never, interval_s=0.02)
    for step in range(5):
        reporter.metric("train/loss", step, 1.0)
    poll(lambda: hub.failures == 0)
    reporter.metric("train/loss", 5, 1.0)
    assert [m.step for m in collect(hub, reporter).metrics] == list(range(6))


def test_orders_reach_the_training_thread_and_asking_is_a_sign_of_life() -> None:
    hub = StumblingHub()
    reporter = RankReporter(hub, INFO, never, interval_s=0.02)
    assert reporter.desired() is Desired.RUN
    hub.drain(Desired.STOP)
    poll(lambda: reporter.desired() is Desired.STOP)
    before = hub.drain(Desired.STOP).heartbeats[0].beats
    reporter.desired()
    poll(lambda: hub.drain(Desired.STOP).heartbeats[0].beats > before)
    reporter.close()


def test_a_lost_hub_ends_the_rank() -> None:
    hub, lost = StumblingHub(), threading.Event()
    hub.is_gone = True
    RankReporter(hub, INFO, lost.set, interval_s=0.02)
    assert lost.wait(10.0)


@dataclass
class Outcome:
    reason: ExitReason
    message: str = ""
    step: int = 0
    checkpoint_step: int | None = None
    error_type: str = ""
    sound_step: int | None = None


def attempt(**spec: Any) -> AttemptFile:
    job_id = "job_01JZZZZZZZZZZZZZZZZZZZZZZZ"
    return AttemptFile(
        job_id=job_id,
        attempt_id="att_01JZZZZZZZZZZZZZZZZZZZZZZZ_0001",
        number=1,
        spec={"resources": {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 1}} | spec,
        spec_hash="",
        training_fingerprint="",
        world_size=1,
        created_at=datetime.now(UTC),
    )


@pytest.mark.parametrize(
    ("spec", "reason", "error_type"),
    [
        ({"resources": {"workers": "many"}}, ExitReason.PLATFORM_ERROR, "ValidationError"),
        ({}, ExitReason.PLATFORM_ERROR, "TimeoutError"),
    ],
)
def test_what_is_raised_before_the_work_becomes_a_value(
    spec: dict[str, Any], reason: ExitReason, error_type: str, tmp_path: Path
) -> None:
    """Rank 1 of a group whose rank 0 never publishes an address; or a spec that cannot be read."""

    class Silent(ReportHub):
        def rendezvous(self) -> str | None:
            raise TimeoutError("rendezvous: rank 0 did not start")

    hub = Silent()
    info = RankInfo(1, "node-id", "host", 42)
    reporter = RankReporter(hub, info, never, interval_s=0.02)
    end = run(
        attempt(**spec),
        info,
        0,
        hub,
        reporter,
        NodeSettings(log_dir=tmp_path),
        lambda *_: Outcome(ExitReason.COMPLETED),
    )
    reporter.close()
    assert isinstance(end, RankEnd)
    assert (end.rank, end.reason, end.error_type) == (1, reason, error_type)
