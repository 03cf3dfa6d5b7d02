"""What processes of an attempt write on their node, one file each: <log_dir>/<attempt id>/<node>/<stream>.log.

Our own lines are JSON ({"t", "level", "msg"}); anything else that lands in the file (libraries, tracebacks, a crash
dump) is wrapped line by line when it is shipped. Text is cleaned of control characters: logs are shown to people.
"""

from __future__ import annotations

import faulthandler
import io
import json
import logging
import os
import re
import signal
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

import structlog
from pydantic import ValidationError

from configs.wire import LogLine

MAX_LINE_BYTES = 16 * 1024
_ANSI = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_LEVELS = {
    "debug": "debug",
    "info": "info",
    "warning": "warning",
    "error": "error",
    "critical": "error",
    "warn": "warning",
}
_RESERVED = ("t", "level", "msg", "event")
_SECRET = re.compile(r"(?i)(secret|password|token|access_key|authorization)")


def node_log_dir(log_dir: Path, attempt_id: str, node_id: str) -> Path:
    """Where an attempt's processes on one node write: apart, because nodes may share a machine or a file system."""
    return log_dir / attempt_id / node_id[:16]


def log_path(node_dir: Path, stream: str) -> Path:
    return node_dir / f"{stream}.log"


def open_log(path: Path) -> int:
    """A descriptor that appends to the file, whose directory only this user may read."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def open_stream(path: Path) -> TextIO:
    """The file as a line-buffered text stream."""
    return os.fdopen(open_log(path), "w", buffering=1, encoding="utf-8", errors="backslashreplace")


class _Tee(io.TextIOBase):
    """Several text streams as one: the driver's lines go to its own file and to Ray's job log."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams

    def write(self, text: str, /) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()


def redirect_output(path: Path) -> None:
    """Sends this process's stdout and stderr, at the level of file descriptors, to the file; so do crashes of the
    interpreter (SIGSEGV and kin) and, on SIGUSR1, the stacks of all threads."""
    fd = open_log(path)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    # Line by line, so that what a dying process said last is in the file.
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    faulthandler.enable(file=sys.stderr, all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)


def configure(*streams: TextIO) -> None:
    """structlog and the standard library's logging write JSON lines to these streams. Secrets by name are masked."""
    stream = streams[0] if len(streams) == 1 else cast(TextIO, _Tee(*streams))
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="t"),
        structlog.processors.format_exc_info,
        _mask_secrets,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.EventRenamer("msg"), structlog.processors.JSONRenderer(default=str)],
        logger_factory=structlog.WriteLoggerFactory(stream),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for chatty in ("httpx", "httpcore", "botocore", "boto3", "urllib3", "s3transfer"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        msg = record.getMessage()
        if record.exc_info:
            msg = f"{msg}\n{self.formatException(record.exc_info)}"
        t = datetime.fromtimestamp(record.created, UTC).isoformat()
        return json.dumps(
            {"t": t, "level": _LEVELS.get(record.levelname.lower(), "info"), "msg": f"{record.name}: {msg}"}
        )


def _mask_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {k: "***" if k not in _RESERVED and _SECRET.search(k) else v for k, v in event.items()}


def clean(text: str) -> str:
    """The text without escape sequences and control characters, except tabs and newlines."""
    return _CONTROL.sub("", _ANSI.sub("", text))


def parse_line(raw: bytes, stream: str, now: datetime) -> LogLine:
    """One line of a node file as it is shipped: our JSON understood, anything else wrapped, long ones cut."""
    cut = len(raw) - MAX_LINE_BYTES
    own = None if cut > 0 else _parse_own(raw)
    if own is not None:
        t, level, msg = own
    else:
        text = raw[:MAX_LINE_BYTES].decode("utf-8", "replace")
        # A progress bar rewrites its line: what it showed last is what a terminal would show.
        t, level, msg = now, "info", text.rstrip("\r").rsplit("\r", 1)[-1]
    note = f" … [{cut} more bytes cut]" if cut > 0 else ""
    return LogLine.model_construct(t=t, stream=stream, level=level, msg=clean(msg) + note)


def _parse_own(raw: bytes) -> tuple[datetime, Any, str] | None:
    if not raw.startswith(b"{"):
        return None
    try:
        fields = json.loads(raw)
        rest = " ".join(f"{k}={v}" for k, v in fields.items() if k not in _RESERVED)
        line = LogLine.model_validate(
            {"t": fields["t"], "stream": "", "level": fields.get("level", "info"), "msg": fields["msg"]}
        )
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError, RecursionError):
        return None
    return line.t, line.level, f"{line.msg} {rest}".rstrip()


def tail(path: Path, num_lines: int) -> tuple[str, ...]:
    """The last lines of a node file, cleaned; none if there is no such file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_lines * MAX_LINE_BYTES // 8))
            lines = file.read().splitlines()
    except OSError:
        return ()
    now = datetime.now(UTC)
    # A tenth of a line's limit each: these travel inside exit files and events.
    texts = (parse_line(raw, "", now).msg[: MAX_LINE_BYTES // 10] for raw in lines[-num_lines:] if raw.strip())
    return tuple(text for text in texts)
