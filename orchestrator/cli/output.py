"""What commands print: tables, numbers with units, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.schemas import JobPublic

STATE_STYLES = {
    "QUEUED": "yellow",
    "PREPARING": "cyan",
    "RUNNING": "bold cyan",
    "RECOVERING": "magenta",
    "PAUSING": "yellow",
    "PAUSED": "yellow",
    "STOPPING": "yellow",
    "SUCCEEDED": "bold green",
    "FAILED": "bold red",
    "CANCELLED": "red",
}
LAST_LINES = 15
_BARS = "▁▂▃▄▅▆▇█"


def console() -> Console:
    """Standard output; wide where it is a file or a pipe, so that nothing is folded."""
    width = None if sys.stdout.isatty() else 240
    return Console(file=sys.stdout, highlight=False, width=width)


def errors() -> Console:
    """Standard error."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def print_json(value: BaseModel | Sequence[BaseModel] | dict[str, Any]) -> None:
    """One JSON document on standard output, for programs."""
    plain: Any
    if isinstance(value, BaseModel):
        plain = value.model_dump(mode="json")
    elif isinstance(value, dict):
        plain = value
    else:
        plain = [item.model_dump(mode="json") for item in value]
    sys.stdout.write(json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def table(columns: Iterable[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A plain table; columns whose name ends in > are right-aligned. Cells may hold markup."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        made.add_column(name.removesuffix(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def state(value: str) -> str:
    """A job's state with its colour, as markup."""
    style = STATE_STYLES.get(value)
    return f"[{style}]{value}[/]" if style else escape(value)


def explanation(job: JobPublic) -> str:
    """Why a job is in its state, in one line: the reason and the first line of the message, said once."""
    message = job.message.partition("\n")[0]
    if not job.reason or job.reason == "COMPLETED" or job.reason in message:
        return message
    return f"{job.reason}: {message}" if message else job.reason


def printable(text: str) -> str:
    """Text of a job with what could move the terminal's cursor escaped."""
    return "".join(c if c in "\t\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def failure(job: JobPublic) -> list[str]:
    """What a job that ended badly, or recovers, says of it: the rank that failed first, its last lines, and what to do
    next. Lines of markup; none for a job that is well."""
    last = job.attempts[-1] if job.attempts else None
    if job.state not in ("FAILED", "CANCELLED", "RECOVERING"):
        return []
    lines = []
    if last is not None and last.first_failure is not None:
        first = last.first_failure
        where = f" on {first.node}" if first.node else ""
        kind = f" ({first.error_type})" if first.error_type else ""
        lines.append(f"  failed      rank {first.rank}{escape(where)} first{escape(kind)}; its last lines:")
        said = first.last_lines[-LAST_LINES:] or ("(it left none)",)
        lines += [f"    [dim]{escape(printable(line.rstrip()))}[/]" for line in said]
    if last is not None and last.exit_reason not in ("USER_CANCELLED", "PAUSED", "PREEMPTED"):
        lines.append(f"  all lines   patchwork logs {job.id}")
    # A crash loop's cause, say, is its last attempt's.
    cause = last.advice if last is not None and job.state == "FAILED" else None
    lines += [f"  next        {escape(advice)}" for advice in dict.fromkeys((cause, job.advice)) if advice]
    return lines


def number(value: float | None, digits: int = 4) -> str:
    """A measured value in so many significant digits; - for none."""
    if value is None:
        return "-"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}" if abs(value) < 10_000 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A fraction as a percentage."""
    return "-" if value is None else f"{100 * value:.2f} %"


def duration(seconds: float | None) -> str:
    """1 h 05 min, 3 min 07 s, 12 s."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole / 86400:.1f} days"


def ago(when: datetime | None) -> str:
    """How long ago, roughly."""
    if when is None:
        return "-"
    seconds = max(0.0, (datetime.now(UTC) - when).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def num_bytes(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def sparkline(values: Sequence[float | None], width: int = 40) -> str:
    """A curve in one line of block characters; a gap where values are missing."""
    step = max(1, -(-len(values) // width))
    picked = values[::step]
    known = [v for v in picked if v is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if v is None else _BARS[round((v - low) * scale)] for v in picked)
