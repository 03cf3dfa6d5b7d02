"""Numbers, times and states as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

KINDS = ("pretrain", "finetune", "evaluate", "export", "inspect", "search", "import")
STATE_WORDS = {
    "QUEUED": "Queued",
    "PREPARING": "Starting",
    "RUNNING": "Running",
    "RECOVERING": "Recovering",
    "PAUSING": "Pausing",
    "PAUSED": "Paused",
    "STOPPING": "Stopping",
    "SUCCEEDED": "Succeeded",
    "FAILED": "Failed",
    "CANCELLED": "Cancelled",
}
STATE_TONES = {
    "QUEUED": "wait",
    "PREPARING": "busy",
    "RUNNING": "run",
    "RECOVERING": "warn",
    "PAUSING": "wait",
    "PAUSED": "wait",
    "STOPPING": "wait",
    "SUCCEEDED": "good",
    "FAILED": "bad",
    "CANCELLED": "off",
}
NONE = "–"


def duration(seconds: float | None) -> str:
    """3 s, 12 min, 3 h 05 min, 4 d 2 h."""
    if seconds is None:
        return NONE
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def ago(at: datetime | None, now: datetime) -> str:
    """'just now', '5 min ago'; the date when it is more than a week."""
    if at is None:
        return NONE
    seconds = (now - at).total_seconds()
    if seconds < 10:
        return "just now"
    if seconds > 7 * 86400:
        return at.astimezone(UTC).strftime("%Y-%m-%d")
    if seconds >= 86400:
        return f"{int(seconds // 86400)} d ago"
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h ago"
    return f"{duration(seconds)} ago"


def moment(at: datetime | None) -> str:
    """A time to the second, UTC."""
    return NONE if at is None else at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def size(num_bytes: float) -> str:
    """12 B, 3.4 MiB."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def count(number: int | None) -> str:
    """12,345."""
    return NONE if number is None else f"{number:,}"


def percent(share: float | None, digits: int = 1) -> str:
    """0.5 -> 50.0 %."""
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def measured(name: str, value: float | None) -> str:
    """A metric's value in the unit its name stands for."""
    if value is None:
        return NONE
    if name in ("eval/top1", "eval/top5", "perf/mfu", "perf/data_wait", "eval/knn"):
        return percent(value, 2)
    if name == "perf/images_per_s":
        return f"{value:,.0f} images/s"
    return f"{value:.4g}"
