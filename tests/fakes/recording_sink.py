"""A sink in memory that keeps a point once, as real ones do, and can be away."""

from __future__ import annotations

from typing import Any

from orchestrator.control.sinks.sink import Delivery, SinkRefused, SinkUnavailable


class RecordingSink:
    """`points` of each job: (name, step) -> value, of its newest generation. `fail_next` calls of `write` fail, as if
    it were away; jobs in `refused` are refused; with `lose_reply` the next write is done and then fails."""

    name = "recording"
    secrets: tuple[str, ...] = ("s3cret",)

    def __init__(self, takes_back: bool = False, every_s: float = 0.0) -> None:
        self.takes_back, self.every_s = takes_back, every_s
        self.points: dict[str, dict[tuple[str, int], float | None]] = {}
        self.deliveries: list[Delivery] = []
        self.ends: dict[str, str] = {}
        self.fail_next = 0
        self.lose_reply = False
        self.refused: set[str] = set()
        self.missing = ""

    def prepare(self) -> None:
        if self.missing:
            raise SinkUnavailable(self.missing)

    def write(self, delivery: Delivery) -> dict[str, Any]:
        if self.fail_next:
            self.fail_next -= 1
            raise SinkUnavailable("http://user:s3cret@sink does not answer")
        if delivery.job.id in self.refused:
            raise SinkRefused("not this one")
        self.deliveries.append(delivery)
        if delivery.memory.get("generation") != delivery.generation:
            self.points.pop(delivery.job.id, None)
        held = self.points.setdefault(delivery.job.id, {})
        held |= {(point.name, point.step): point.value for point in delivery.points}
        if delivery.final:
            self.ends[delivery.job.id] = delivery.job.state
        if self.lose_reply:
            self.lose_reply = False
            raise SinkUnavailable("the reply was lost")
        return {"generation": delivery.generation}
