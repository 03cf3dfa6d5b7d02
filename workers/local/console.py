"""The Reporter of a job that runs in this process: a progress bar, events as they come, every metric in a file."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.states import Desired
from configs.wire import MetricColumns, Phase

PLAIN_EVERY_S = 15.0
_SHOWN = {"train/loss": "loss {:.4f}", "perf/images_per_s": "{:,.0f} images/s", "eval/top1": "top-1 {:.2%}"}


class ConsoleReporter:
    """Shows what the rank tells; `leave` makes it hear an order to save and leave. `on_checkpoint` is called when one
    is committed. Use it in a `with` block."""

    def __init__(self, out: Console, metrics: Path, total_steps: int, on_checkpoint: Callable[[], None]) -> None:
        self._out = out
        self._metrics_file = metrics.open("a")
        self._total_steps = total_steps
        self._on_checkpoint = on_checkpoint
        self._order = Desired.RUN
        self._latest: dict[str, float] = {}
        self._phase: Phase = "starting"
        self._printed_at = -PLAIN_EVERY_S
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[measures]}[/]"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
        self._task = self._bar.add_task("starting", total=total_steps, measures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._metrics_file.close()

    def leave(self) -> None:
        """Save at the next step, and leave."""
        self._order = Desired.STOP

    def heartbeat(self, phase: Phase, step: int) -> None:
        is_new = phase != self._phase
        self._phase = phase
        self._bar.update(self._task, description=phase, completed=step, measures=self._measures())
        if not self._out.is_terminal and (is_new or time.monotonic() - self._printed_at > PLAIN_EVERY_S):
            self._printed_at = time.monotonic()
            self._out.print(f"{phase:<10} step {step:,}/{self._total_steps:,}  {self._measures()}".rstrip())

    def metric(self, name: str, step: int, value: float) -> None:
        number = float(value) if math.isfinite(value) else None
        print(json.dumps({"name": name, "step": step, "value": number}), file=self._metrics_file)
        if number is not None:
            self._latest[name] = number

    def event(self, type_: str, message: str, data: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        self._out.print(f"[dim]{type_}[/]  {escape(message)}")

    def checkpoint(self, checkpoint_id: str) -> None:  # noqa: ARG002 - the Reporter's signature
        self._on_checkpoint()

    def flush(self) -> None:
        self._metrics_file.flush()

    def take_measured(self) -> tuple[MetricColumns, ...]:
        # They are in this process's own file, which nobody else writes.
        return ()

    def desired(self) -> Desired:
        return self._order

    @property
    def latest(self) -> dict[str, float]:
        """The newest value of each metric."""
        return self._latest

    def _measures(self) -> str:
        return "  ".join(text.format(self._latest[name]) for name, text in _SHOWN.items() if name in self._latest)
