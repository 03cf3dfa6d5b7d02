"""Logs as users read them: the chunks that couriers left in the object store, merged by time.

Attempts are read one after the other; within an attempt the streams (driver, rank-00000, …) are merged. A cursor names
the attempt and, for each of its streams, the chunk and the byte where reading goes on, so any reader can stop and go on
anywhere. Memory holds one window per stream, never a log.
"""

from __future__ import annotations

import base64
import binascii
import heapq
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError
from sqlalchemy import select

from configs.ids import attempt_id
from configs.layout import log_chunk_key, logs_prefix
from configs.states import AttemptState, JobState
from configs.wire import LogLine
from orchestrator.schemas import LogPage
from orchestrator.services.jobs import find_job
from orchestrator.services.patterns import matches
from orchestrator.services.problems import Invalid, field_error
from orchestrator.services.streams import Batch, Item
from orchestrator.storage.db import Database
from orchestrator.storage.store import NotFound, ObjectStore
from orchestrator.storage.tables import AttemptRow

LEVELS = ("debug", "info", "warning", "error")
MAX_TAIL = 10_000
_SCAN_BYTES = 16 * 1024 * 1024
"""A page stops after so many bytes, found or not, and says where to go on."""
_MERGE_BYTES = 32 * 1024 * 1024
"""Held at once while streams are merged; a thousand ranks get small windows each."""
_SMALLEST_WINDOW = 64 * 1024
_FOLLOW_LINES = 1000
_SEARCHED_CHARS = 10_000
"""Of a message, with a regular expression."""
_REGEX_TAIL = 20_000
"""A tail with a regular expression is looked for among so many of the last lines."""
SETTLE_S = 3.0
"""After the end of a job its log counts as complete."""
_STREAM = re.compile(r"^[A-Za-z0-9_.-]{1,64}$")
_CHUNK = re.compile(r"^(?P<stream>[A-Za-z0-9_.-]{1,64})/(?P<chunk>[0-9]{6})\.jsonl$")


@dataclass(frozen=True)
class LogFilter:
    """Which lines to read. An empty field does not filter."""

    attempt: int | None = None
    stream: str | None = None
    level: str | None = None
    """This level and those above it."""
    text: str | None = None
    """A part of the message, in any case."""
    regex: str | None = None
    """A regular expression that is found in the message, in any case (`check_pattern`)."""
    since: datetime | None = None
    until: datetime | None = None
    """Only lines from this time on, and only those before that one."""

    def matches(self, line: LogLine) -> bool:
        """Whether a line is wanted, as far as can be told without the regular expression."""
        if self.level is not None and LEVELS.index(line.level) < LEVELS.index(self.level):
            return False
        if (self.since is not None and line.t < self.since) or (self.until is not None and line.t >= self.until):
            return False
        return self.text is None or self.text.lower() in line.msg.lower()

    def chosen(self, lines: Sequence[LogLine]) -> list[LogLine]:
        """Of lines that match, those in which the regular expression is found. Raises Invalid: that takes too long."""
        if self.regex is None:
            return list(lines)
        found = matches(self.regex, [line.msg[:_SEARCHED_CHARS] for line in lines])
        return [line for line, is_in in zip(lines, found, strict=True) if is_in]


@dataclass
class Position:
    """Where reading goes on: everything before `attempt` was read, and of its streams everything before
    (chunk, byte)."""

    attempt: int = 0
    streams: dict[str, tuple[int, int]] = field(default_factory=dict)

    def encode(self) -> str:
        body = json.dumps({"a": self.attempt, "s": self.streams}, separators=(",", ":"), sort_keys=True)
        return base64.urlsafe_b64encode(zlib.compress(body.encode())).decode()


def parse_cursor(cursor: str | None) -> Position:
    """The position a cursor names; the beginning for None.

    Raises:
        Invalid: it is not one of ours.
    """
    if cursor is None:
        return Position()
    try:
        packed = base64.b64decode(cursor, altchars=b"-_", validate=True)
        # Bounded: a cursor is input, and a few bytes of zlib can stand for gigabytes.
        raw = json.loads(zlib.decompressobj().decompress(packed, 1_000_000))
        streams = {str(name): (int(chunk), int(start)) for name, (chunk, start) in raw["s"].items()}
        position = Position(int(raw["a"]), streams)
    except (binascii.Error, zlib.error, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _bad_cursor(cursor) from None
    numbers = [position.attempt, *(n for pair in streams.values() for n in pair)]
    if any(not 0 <= n < 2**53 for n in numbers) or not all(_STREAM.match(name) for name in streams):
        raise _bad_cursor(cursor)
    return position


@dataclass(frozen=True)
class _View:
    """The job as this read sees it: its attempts, and whether any of them may still write."""

    job_id: str
    attempts: tuple[int, ...]
    ended: frozenset[int]
    finished: bool


class LogReader:
    """Reads one job's lines forward from a position. Not for several threads at once."""

    def __init__(self, db: Database, store: ObjectStore, job_id: str, wanted: LogFilter, position: Position) -> None:
        self.db = db
        self.store = store
        self.job_id = job_id
        self.wanted = wanted
        self.position = position

    def read(self, limit: int) -> tuple[list[LogLine], bool, bool]:
        """Up to `limit` lines; whether there may be more right now; whether there will never be more.

        Raises:
            problems.NotFound: there is no such job.
        """
        # The view comes first: an attempt that had ended before its chunks were listed has no more to come.
        view = self._view()
        lines: list[LogLine] = []
        budget = _SCAN_BYTES
        for number in view.attempts:
            if number < self.position.attempt:
                continue
            if number > self.position.attempt:
                self.position = Position(number)
            for line, num_bytes in _merged(self.store, attempt_id(self.job_id, number), self.wanted, self.position):
                budget -= num_bytes
                if self.wanted.matches(line):
                    lines.append(line)
                if len(lines) >= limit or budget <= 0:
                    return self.wanted.chosen(lines), True, False
            if number not in view.ended:
                return self.wanted.chosen(lines), False, False
        return self.wanted.chosen(lines), False, view.finished

    def check(self) -> None:
        """Raises problems.NotFound: there is no such job."""
        self._view()

    def skip_to_tail(self, num_lines: int) -> list[LogLine]:
        """The last `num_lines` lines there are; reading goes on after them."""
        lines: list[LogLine] = []
        ends: Position | None = None
        for number in reversed(self._view().attempts):
            at_most = num_lines - len(lines) if self.wanted.regex is None else _REGEX_TAIL
            found, position = _tail(self.store, attempt_id(self.job_id, number), self.wanted, at_most)
            lines = (self.wanted.chosen(found) + lines)[-num_lines:]
            ends = ends or Position(number, position)
            if len(lines) >= num_lines:
                break
        self.position = ends or self.position
        return lines

    def _view(self) -> _View:
        with self.db.reader() as session:
            job = find_job(session, self.job_id)
            query = select(AttemptRow.number, AttemptRow.state).where(AttemptRow.job_id == self.job_id)
            rows = [(number, state) for number, state in session.execute(query.order_by(AttemptRow.number))]
            # Couriers ship their last lines while the end of the job is being written down.
            settled = datetime.now(UTC) - timedelta(seconds=SETTLE_S)
            finished = JobState(job.state).is_terminal and (job.ended_at is None or job.ended_at <= settled)
        chosen = [(n, state) for n, state in rows if self.wanted.attempt in (None, n)]
        ended = frozenset(n for n, state in chosen if finished or state == AttemptState.ENDED)
        only_ended = self.wanted.attempt is not None and bool(chosen) and len(ended) == len(chosen)
        return _View(self.job_id, tuple(n for n, _ in chosen), ended, finished or only_ended)


def read_page(
    db: Database, store: ObjectStore, job_id: str, wanted: LogFilter, limit: int, cursor: str | None, tail: int | None
) -> LogPage:
    """A page of lines from `cursor` on, or the last `tail` lines.

    Raises:
        problems.NotFound: there is no such job.
        Invalid: the cursor is not one of ours.
    """
    reader = LogReader(db, store, job_id, wanted, parse_cursor(cursor))
    if tail is not None and cursor is None:
        return LogPage(lines=tuple(reader.skip_to_tail(tail)), cursor=reader.position.encode(), complete=False)
    lines, more, complete = reader.read(limit)
    return LogPage(lines=tuple(lines), cursor=reader.position.encode(), more=more, complete=complete)


def read_text(db: Database, store: ObjectStore, job_id: str, wanted: LogFilter) -> Iterator[str]:
    """The whole log as text, page by page. Raises NotFound before the first: there is no such job."""
    reader = LogReader(db, store, job_id, wanted, Position())
    reader.check()
    return _pages_of_text(reader)


def _pages_of_text(reader: LogReader) -> Iterator[str]:
    more = True
    while more:
        lines, more, _ = reader.read(_FOLLOW_LINES)
        yield "".join(as_text(line) for line in lines)


def as_text(line: LogLine) -> str:
    """One line for people: what could move a terminal's cursor is escaped, and further lines of a message are indented,
    so that none can pass for a line of its own."""
    msg = "".join(c if c in "\t\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in line.msg)
    msg = msg.rstrip("\n").replace("\n", "\n    ")
    return f"{line.t.isoformat(timespec='milliseconds')} {line.stream:<10} {line.level:<7} {msg}\n"


class LogFollower:
    """Yields lines as they arrive, until the job has ended and all were sent."""

    def __init__(self, reader: LogReader, tail: int | None) -> None:
        self.reader = reader
        self.tail = tail

    def poll(self) -> Batch:
        """Lines since the last poll. Blocks for a query and a few reads of the store."""
        if self.tail is not None:
            lines, more, done = self.reader.skip_to_tail(self.tail), True, False
            self.tail = None
        else:
            lines, more, done = self.reader.read(_FOLLOW_LINES)
        # Only the last line carries the position: an id in the middle would claim lines that were not sent yet.
        cursor = self.reader.position.encode()
        items = [Item(id=None, event="line", data=line.model_dump_json()) for line in lines[:-1]]
        items += [Item(id=cursor, event="line", data=line.model_dump_json()) for line in lines[-1:]]
        return Batch(items=items, more=more, done=done)


# -- one attempt -------------------------------------------------------------------------------------------------------
@dataclass
class _Head:
    """The next unread line of a stream."""

    line: LogLine
    num_bytes: int
    after: tuple[int, int]


def _merged(store: ObjectStore, attempt: str, wanted: LogFilter, position: Position) -> Iterator[tuple[LogLine, int]]:
    """Lines with their sizes, merged by time over the attempt's streams; advances `position` with each one."""
    streams = _streams(store, attempt, wanted)
    window = max(_SMALLEST_WINDOW, _MERGE_BYTES // max(1, len(streams)))
    sources = {
        stream: _lines(store, attempt, stream, sizes, position.streams.get(stream, (0, 0)), window)
        for stream, sizes in streams.items()
    }
    heads: list[tuple[float, str, _Head]] = []
    for stream, source in sources.items():
        _push(heads, stream, source)
    while heads:
        _, stream, head = heapq.heappop(heads)
        position.streams[stream] = head.after
        _push(heads, stream, sources[stream])
        yield head.line, head.num_bytes


def _push(heads: list[tuple[float, str, _Head]], stream: str, source: Iterator[_Head]) -> None:
    head = next(source, None)
    if head is not None:
        heapq.heappush(heads, (head.line.t.timestamp(), stream, head))


def _streams(store: ObjectStore, attempt: str, wanted: LogFilter) -> dict[str, list[int]]:
    """Sizes of every stream's chunks, by chunk number, as far as they follow on one another without a gap."""
    prefix = logs_prefix(attempt)
    under = prefix if wanted.stream is None else f"{prefix}{wanted.stream}/"
    found: dict[str, dict[int, int]] = {}
    for item in store.list(under):
        match = _CHUNK.match(item.key.removeprefix(prefix))
        if match is not None:
            found.setdefault(match["stream"], {})[int(match["chunk"])] = item.size
    return {stream: _without_gap(sizes) for stream, sizes in sorted(found.items())}


def _without_gap(sizes: Mapping[int, int]) -> list[int]:
    # A listing may lag behind: a chunk after a missing one is left for the next look.
    return [sizes[n] for n in itertools.takewhile(sizes.__contains__, itertools.count())]


def _lines(
    store: ObjectStore, attempt: str, stream: str, sizes: list[int], start: tuple[int, int], window: int
) -> Iterator[_Head]:
    chunk, offset = start
    for number in range(chunk, len(sizes)):
        at = offset if number == chunk else 0
        for raw in raw_lines(store, log_chunk_key(attempt, stream, number), at, sizes[number], window):
            at += len(raw)
            # The end of a chunk is the start of the next one.
            after = (number, at) if at < sizes[number] else (number + 1, 0)
            line = _parse(raw)
            if line is not None:
                yield _Head(line, len(raw), after)


def raw_lines(store: ObjectStore, key: str, start: int, size: int, window: int) -> Iterator[bytes]:
    """The lines of an object of `size` bytes from byte `start` on, each with its newline, read `window` bytes at a
    time."""
    rest = b""
    while start < size:
        try:
            piece = b"".join(store.stream(key, start, min(window, size - start)))
        except NotFound:
            # Listed a moment ago: the job's files were deleted meanwhile.
            return
        start += len(piece)
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line + b"\n"
        if not piece:
            break
    if rest:
        yield rest


def _parse(raw: bytes) -> LogLine | None:
    """A line of a chunk; one that is not ours is no line (couriers write only ours)."""
    try:
        return LogLine.model_validate_json(raw)
    except ValidationError:
        return None


def _tail(
    store: ObjectStore, attempt: str, wanted: LogFilter, num_lines: int
) -> tuple[list[LogLine], dict[str, tuple[int, int]]]:
    """The attempt's last lines, and where its streams end. Chunks are read from the last one backwards, and no
    further than a line can still be among the last ones."""
    newest: list[tuple[float, str, int, int, LogLine]] = []
    ends: dict[str, tuple[int, int]] = {}
    for stream, sizes in _streams(store, attempt, wanted).items():
        ends[stream] = (len(sizes), 0)
        for number in reversed(range(len(sizes))):
            lines = [
                head.line for head in _lines(store, attempt, stream, sizes[: number + 1], (number, 0), _MERGE_BYTES)
            ]
            if len(newest) >= num_lines and lines and lines[-1].t.timestamp() < newest[0][0]:
                break
            for index, line in enumerate(lines):
                if wanted.matches(line):
                    heapq.heappush(newest, (line.t.timestamp(), stream, number, index, line))
                    if len(newest) > num_lines:
                        heapq.heappop(newest)
    return [entry[-1] for entry in sorted(newest, key=lambda entry: entry[:-1])], ends


def _bad_cursor(cursor: str) -> Invalid:
    return Invalid(
        "The cursor is not one of ours.", errors=[field_error("/cursor", "give the cursor as it came", cursor)]
    )
