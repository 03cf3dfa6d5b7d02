"""The seam between the training loop and whoever listens: heartbeats, metrics, events up; orders down."""

from __future__ import annotations

from typing import Any, Protocol

from configs.states import Desired
from configs.wire import MetricColumns, Phase


class Reporter(Protocol):
    """What a rank may tell its driver. No call raises, and none but `flush` blocks: a background thread sends."""

    def heartbeat(self, phase: Phase, step: int) -> None:
        """Note where this rank is; sent with the next push."""
        ...

    def metric(self, name: str, step: int, value: float) -> None:
        """Record one point. Non-finite values are sent as null."""
        ...

    def event(self, type_: str, message: str, data: dict[str, Any] | None = None) -> None:
        """Record a fact worth telling the user."""
        ...

    def checkpoint(self, checkpoint_id: str) -> None:
        """A manifest now exists."""
        ...

    def flush(self) -> None:
        """Return once all that was noted so far has left this process, or after a few seconds. Not for the step."""
        ...

    def take_measured(self) -> tuple[MetricColumns, ...]:
        """The points recorded since the last call, as they go into a checkpoint beside being sent."""
        ...

    def desired(self) -> Desired:
        """The control plane's latest order, as far as this rank knows."""
        ...
