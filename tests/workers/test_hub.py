"""The meeting point of ranks and driver, as a plain object."""

from __future__ import annotations

from datetime import UTC, datetime

from configs.reasons import ExitReason
from configs.states import Desired
from configs.wire import Heartbeat, MetricPoint, WorkerEvent
from workers import hub as hub_module
from workers.diagnosis import RankEnd
from workers.hub import Push, RankInfo, ReportHub

NOW = datetime.now(UTC)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def push(rank: int = 0, step: int = 1, num_metrics: int = 1) -> Push:
    heartbeat = Heartbeat(rank=rank, node="n", pid=1, phase="training", step=step, at=NOW)
    metrics = tuple(MetricPoint(name="train/loss", step=step + i, value=0.5, at=NOW) for i in range(num_metrics))
    event = WorkerEvent(type="note", message=f"step {step}", at=NOW)
    return Push(heartbeat, metrics, (event,), (f"ckpt_{step}",))


def test_drain_gives_everything_once() -> None:
    hub = ReportHub()
    hub.push(push(step=1))
    hub.push(push(step=2))
    drained = hub.drain(Desired.RUN)
    assert [m.step for m in drained.metrics] == [1, 2]
    assert [e.message for e in drained.events] == ["step 1", "step 2"]
    assert drained.checkpoints == ("ckpt_1", "ckpt_2")
    again = hub.drain(Desired.RUN)
    assert (again.metrics, again.events, again.checkpoints) == ((), (), ())
    assert again.heartbeats[0].step == 2, "the latest heartbeat stays"


def test_orders_come_back_with_the_next_push() -> None:
    hub = ReportHub()
    assert hub.push(push()) is Desired.RUN
    hub.drain(Desired.PAUSE)
    assert hub.push(push()) is Desired.PAUSE
    assert hub.enter(RankInfo(1, "id", "n", 2)) is Desired.PAUSE


def test_the_first_word_of_a_rank_counts_and_ends_are_ordered() -> None:
    hub = ReportHub()
    hub.finish(RankEnd(1, ExitReason.DATA_ERROR))
    hub.finish(RankEnd(0, ExitReason.WORKER_LOST))
    hub.finish(RankEnd(1, ExitReason.COMPLETED))
    ends = hub.drain(Desired.RUN).ends
    assert ends[1].reason is ExitReason.DATA_ERROR
    assert (ends[1].order, ends[0].order) == (0, 1)


def test_silence_is_measured_by_the_hubs_clock() -> None:
    clock = Clock()
    hub = ReportHub(clock)
    hub.enter(RankInfo(0, "id", "n", 1))
    hub.push(push(rank=1))
    clock.now = 7.0
    hub.push(push(rank=1))
    clock.now = 9.0
    assert hub.drain(Desired.RUN).silent_s == {0: 9.0, 1: 2.0}


def test_metrics_are_bounded_and_the_loss_is_told() -> None:
    hub = ReportHub()
    for _ in range(5):
        hub.push(push(num_metrics=hub_module.MAX_METRICS // 4))
    drained = hub.drain(Desired.RUN)
    assert len(drained.metrics) == hub_module.MAX_METRICS
    assert drained.dropped_metrics == hub_module.MAX_METRICS // 4


def test_rendezvous() -> None:
    hub = ReportHub()
    assert hub.rendezvous() is None
    hub.publish("127.0.0.1:4000")
    assert hub.rendezvous() == "127.0.0.1:4000"
