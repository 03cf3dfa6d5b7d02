"""Showing the parts of a stack as they start."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Steps:
    """Shows the parts starting: spinners on a terminal, lines elsewhere."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._bar = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=out,
            disable=not out.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def note(self, part: str, state: str) -> None:
        """A part is starting, ready or failed."""
        if not self._out.is_terminal:
            self._out.print(f"{part}: {state} ({time.monotonic() - self._started:.1f} s)")
        if part not in self._tasks:
            self._tasks[part] = self._bar.add_task(part, total=1)
        if state == "ready":
            self._bar.update(self._tasks[part], completed=1)
        elif state == "failed":
            self._bar.update(self._tasks[part], description=f"[red]{part} failed[/]")
