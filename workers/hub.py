"""Where ranks and driver meet: a zero-CPU actor on the driver's node. Ranks push, the driver drains.

It holds no decision. Nothing here blocks: the rendezvous is polled, orders come back in the reply to a push.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from configs.states import Desired
from configs.wire import Heartbeat, MetricPoint, WorkerEvent
from workers.diagnosis import RankEnd

MAX_METRICS = 200_000
MAX_EVENTS = 10_000


@dataclass(frozen=True)
class RankInfo:
    """Where a rank runs."""

    rank: int
    node_id: str
    node: str
    """Host name, for people."""
    pid: int


@dataclass(frozen=True)
class Push:
    """What a rank tells in one second."""

    heartbeat: Heartbeat
    metrics: tuple[MetricPoint, ...] = ()
    events: tuple[WorkerEvent, ...] = ()
    checkpoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drained:
    """Everything that came in since the last drain, and how every rank stands."""

    infos: dict[int, RankInfo] = field(default_factory=dict)
    heartbeats: dict[int, Heartbeat] = field(default_factory=dict)
    """The latest of each rank."""
    silent_s: dict[int, float] = field(default_factory=dict)
    """Seconds since each rank was heard of, by the hub's clock."""
    ends: dict[int, RankEnd] = field(default_factory=dict)
    metrics: tuple[MetricPoint, ...] = ()
    events: tuple[WorkerEvent, ...] = ()
    checkpoints: tuple[str, ...] = ()
    dropped_metrics: int = 0
    """Since the start: the driver did not drain in time."""


class ReportHub:
    """One attempt's meeting point. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._desired = Desired.RUN
        self._address: str | None = None
        self._infos: dict[int, RankInfo] = {}
        self._heartbeats: dict[int, Heartbeat] = {}
        self._heard: dict[int, float] = {}
        self._ends: dict[int, RankEnd] = {}
        self._metrics: deque[MetricPoint] = deque(maxlen=MAX_METRICS)
        self._events: deque[WorkerEvent] = deque(maxlen=MAX_EVENTS)
        self._checkpoints: list[str] = []
        self._dropped = 0

    def enter(self, info: RankInfo) -> Desired:
        """A rank has started."""
        self._infos[info.rank] = info
        self._heard[info.rank] = self._clock()
        return self._desired

    def publish(self, address: str) -> None:
        """Rank 0 tells where its key-value store listens."""
        self._address = address

    def rendezvous(self) -> str | None:
        """Rank 0's address, once it is known."""
        return self._address

    def push(self, push: Push) -> Desired:
        """Takes a rank's report; returns the latest order."""
        rank = push.heartbeat.rank
        self._heartbeats[rank] = push.heartbeat
        self._heard[rank] = self._clock()
        self._dropped += max(0, len(self._metrics) + len(push.metrics) - MAX_METRICS)
        self._metrics.extend(push.metrics)
        self._events.extend(push.events)
        self._checkpoints.extend(push.checkpoints)
        return self._desired

    def finish(self, end: RankEnd) -> None:
        """A rank's last word. The first one counts."""
        self._ends.setdefault(end.rank, replace(end, order=len(self._ends)))
        self._heard[end.rank] = self._clock()

    def drain(self, desired: Desired) -> Drained:
        """Everything since the last drain; sets the order that ranks get from now on."""
        self._desired = desired
        now = self._clock()
        drained = Drained(
            infos=dict(self._infos),
            heartbeats=dict(self._heartbeats),
            silent_s={rank: now - heard for rank, heard in self._heard.items()},
            ends=dict(self._ends),
            metrics=tuple(self._metrics),
            events=tuple(self._events),
            checkpoints=tuple(self._checkpoints),
            dropped_metrics=self._dropped,
        )
        self._metrics.clear()
        self._events.clear()
        self._checkpoints.clear()
        return drained
