"""Logs of a job: followed live, searched, filtered by rank and level, and taken away as a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from configs.wire import LogLine
from orchestrator.dashboard import parts
from orchestrator.dashboard.feeds import EVERY_S, SELDOM_S, Look
from orchestrator.dashboard.frame import Frame, url
from orchestrator.schemas import JobPublic
from orchestrator.services.logs import LogFilter, LogReader, Position
from orchestrator.services.patterns import check_pattern
from orchestrator.services.problems import Invalid

KEPT = 2000
_LEVELS = {"": "All", "info": "Info and above", "warning": "Warnings and errors", "error": "Errors"}
_PAGE = 1000


@dataclass(frozen=True)
class Tail:
    """The newest lines. `total` is how many were read in all: what a page has shown already it need not show again."""

    total: int
    complete: bool
    lines: tuple[LogLine, ...] = field(compare=False)


def draw(frame: Frame, job: JobPublic) -> Callable[[JobPublic], None]:
    """The tab."""
    _Logs(frame, job)
    return lambda _: None


class _Logs:
    def __init__(self, frame: Frame, job: JobPublic) -> None:
        self.frame, self.job = frame, job
        self._wanted = LogFilter()
        self._shown = 0
        self._follow_end = True
        self._stop: Callable[[], None] = lambda: None
        ranks = {f"rank-{rank:05d}": f"Rank {rank}" for rank in range(min(_num_ranks(job), 256))}
        with parts.card("Logs") as head:
            with head:
                self._download = parts.link("Download", self._address(), "btn", download="")
            with parts.tag("div", "", "filters", role="search"):
                parts.text_field("Search", "", lambda v: self._want(text=v), classes="wide", placeholder="A word")
                self._pattern = parts.text_field("Pattern", "", self._want_pattern, placeholder="loss: (nan|inf)")
                parts.choice("From", {"": "Everyone", "driver": "Driver"} | ranks, "", lambda v: self._want(stream=v))
                parts.choice("Level", _LEVELS, "", lambda v: self._want(level=v))
                parts.moment_field("Since (UTC)", lambda at: self._want(since=at))
                parts.moment_field("Until (UTC)", lambda at: self._want(until=at))
                attempts = {str(a.number): f"Attempt {a.number}" for a in job.attempts}
                parts.choice("Attempt", {"": "All"} | attempts, "", lambda v: self._want(attempt=int(v or 0)))
            parts.checkbox("Follow the end", True, self._set_follow)
            self._lines = parts.LogLines()
        self._start()

    def _set_follow(self, on: bool) -> None:
        self._follow_end = on

    def _want(self, **changes: Any) -> None:
        self._wanted = replace(self._wanted, **{name: value or None for name, value in changes.items()})
        self._download.props["href"] = self._address()
        self._download.update()
        self._start()

    def _want_pattern(self, pattern: str) -> None:
        try:
            check_pattern(pattern)
        except Invalid as error:
            self._pattern.say_wrong(error.detail)
            return
        self._pattern.say_wrong("")
        self._want(regex=pattern)

    def _address(self) -> str:
        w = self._wanted
        query = {"attempt": str(w.attempt or ""), "stream": w.stream or "", "level": w.level or ""}
        query |= {"q": w.text or "", "regex": w.regex or ""}
        query |= {name: at.isoformat() for name, at in (("since", w.since), ("until", w.until)) if at is not None}
        return url(f"/files/jobs/{self.job.id}/log", **query)

    def _start(self) -> None:
        self._stop()
        self._shown = 0
        self._lines.clear_lines()
        self._lines.say("Reading …")
        key = ("logs", self.job.id, self._wanted)
        self._stop = self.frame.follow(key, _reader(self.frame, self.job.id, self._wanted), self._show)

    def _show(self, view: Tail) -> None:
        new = min(view.total - self._shown, len(view.lines))
        self._shown = view.total
        if new:
            self._lines.append([_cells(line) for line in view.lines[-new:]], self._follow_end)
        is_filtered = self._wanted != LogFilter()
        nothing = "No line matches." if is_filtered else "Nothing was logged yet."
        self._lines.say("" if view.total else nothing)


def _num_ranks(job: JobPublic) -> int:
    return max((attempt.world_size for attempt in job.attempts), default=0)


def _cells(line: LogLine) -> tuple[str, str, str, str]:
    return (line.t.strftime("%H:%M:%S"), line.stream, line.level, line.msg.rstrip("\n")[:20_000])


def _reader(frame: Frame, job_id: str, wanted: LogFilter) -> Callable[[], Look[Tail]]:
    """Reads the newest lines, then on from there."""
    reader = LogReader(frame.services.db, frame.services.store, job_id, wanted, Position())
    kept: list[LogLine] = []
    total, is_first, complete = 0, True, False

    def read() -> Look[Tail]:
        nonlocal total, is_first, complete
        if is_first:
            lines = reader.skip_to_tail(KEPT)
            is_first = False
        elif not complete:
            lines, _, complete = reader.read(_PAGE)
        else:
            lines = []
        total += len(lines)
        kept.extend(lines)
        del kept[:-KEPT]
        return Look(Tail(total, complete, tuple(kept)), SELDOM_S if complete else EVERY_S)

    return read
