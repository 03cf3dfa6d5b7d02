"""A Reporter that keeps what it is told, and gives the orders a test wants given."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from configs.states import Desired
from configs.wire import MetricColumns, MetricPoint, Phase, to_columns


class RecordingReporter:
    """`order(step)` is what `desired` answers once a heartbeat has named that step."""

    def __init__(self, order: Callable[[int], Desired] = lambda _: Desired.RUN) -> None:
        self.metrics: dict[str, dict[int, float]] = {}
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.checkpoints: list[str] = []
        self.phases: list[Phase] = []
        self.step = 0
        self._since_taken: list[MetricPoint] = []
        self._order = order

    def heartbeat(self, phase: Phase, step: int) -> None:
        self.step = step
        if not self.phases or self.phases[-1] != phase:
            self.phases.append(phase)

    def metric(self, name: str, step: int, value: float) -> None:
        self.metrics.setdefault(name, {})[step] = value
        self._since_taken.append(MetricPoint(name=name, step=step, value=value, at=datetime.now(UTC)))

    def event(self, type_: str, message: str, data: dict[str, Any] | None = None) -> None:
        self.events.append((type_, message, data or {}))

    def checkpoint(self, checkpoint_id: str) -> None:
        self.checkpoints.append(checkpoint_id)

    def flush(self) -> None:
        pass

    def take_measured(self) -> tuple[MetricColumns, ...]:
        taken, self._since_taken = to_columns(self._since_taken), []
        return taken

    def desired(self) -> Desired:
        return self._order(self.step)
