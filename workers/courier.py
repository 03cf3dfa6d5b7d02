"""Ships a node's output to the object store, so that it outlives ranks, driver and node.

One courier per node and attempt reads the node's files (workers/logs.py) and writes chunks of LogLine JSON lines under
`configs.layout.log_chunk_key`, numbered from 0 without gaps. How far it came lies beside each file
(`<stream>.shipped`), so a courier that starts again goes on after the last chunk.

The driver runs one in a thread for its own node; on other nodes it is a zero-CPU actor.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import structlog

from configs.layout import log_chunk_key
from configs.wire import LogLine
from workers.logs import log_path, node_log_dir, parse_line, tail
from workers.node import load_node_settings, open_store
from workers.oom import num_oom_kills
from workers.store import AlreadyExists, ObjectStore, StoreError

log = structlog.get_logger(__name__)
CHUNK_BYTES = 256 * 1024
CHUNK_AGE_S = 2.0
KEEP_LOGS_S = 7 * 86400.0
_POLL_S = 0.5
_PAUSE_AFTER_ERROR_S = 5.0
_READ_BYTES = 1024 * 1024


class LogShipment:
    """One file's way into the store. `ship` moves everything that is due."""

    def __init__(self, path: Path, attempt_id: str, store: ObjectStore) -> None:
        self._path = path
        self._stream = path.stem
        self._attempt_id = attempt_id
        self._store = store
        self._state_path = path.with_suffix(".shipped")
        self._offset, self._chunk = self._read_state()
        self._waiting_since: float | None = None

    def ship(self, now: float, final: bool = False) -> None:
        """Writes the chunks that are full or old enough; all that there is, and a last unended line, if `final`.

        Raises:
            StoreError: the store could not be used; nothing is lost and the call may be repeated.
        """
        while True:
            lines = self._pending(final)
            if not lines:
                self._waiting_since = None
                return
            if self._waiting_since is None:
                self._waiting_since = now
            size = sum(map(len, lines))
            if not final and size < CHUNK_BYTES and now - self._waiting_since < CHUNK_AGE_S:
                return
            self._put(lines)
            self._waiting_since = None

    def _pending(self, final: bool) -> list[bytes]:
        """Whole lines (with their ends) after the offset, at most a chunk of them."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            block = file.read(_READ_BYTES)
        lines = block.splitlines(keepends=True) if b"\r" not in block else _split_newlines(block)
        if lines and not lines[-1].endswith(b"\n") and not final and len(lines[-1]) < _READ_BYTES:
            lines.pop()
        taken, size = 0, 0
        while taken < len(lines) and size < CHUNK_BYTES:
            size += len(lines[taken])
            taken += 1
        return lines[:taken]

    def _put(self, lines: list[bytes]) -> None:
        now = datetime.now(UTC)
        parsed = [parse_line(raw.rstrip(b"\n"), self._stream, now) for raw in lines]
        data = b"".join(line.model_dump_json().encode() + b"\n" for line in parsed)
        try:
            self._store.put(log_chunk_key(self._attempt_id, self._stream, self._chunk), data, if_none_match=True)
            shipped = len(lines)
        except AlreadyExists:
            shipped = self._already_shipped(parsed)
        self._chunk += 1
        self._offset += sum(map(len, lines[:shipped]))
        self._write_state()

    def _already_shipped(self, lines: list[LogLine]) -> int:
        """How many of these lines the existing chunk holds: as many as it has if a courier died (or a reply was lost)
        between the write and the note of it, none if the chunk is of something else."""
        key = log_chunk_key(self._attempt_id, self._stream, self._chunk)
        there = [LogLine.model_validate_json(raw).msg for raw in self._store.get(key).splitlines()]
        return len(there) if there == [line.msg for line in lines[: len(there)]] else 0

    def _read_state(self) -> tuple[int, int]:
        try:
            state = json.loads(self._state_path.read_text())
            return int(state["offset"]), int(state["chunk"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 0

    def _write_state(self) -> None:
        temporary = self._state_path.with_suffix(".shipped.new")
        temporary.write_text(json.dumps({"offset": self._offset, "chunk": self._chunk}))
        temporary.replace(self._state_path)


def _split_newlines(block: bytes) -> list[bytes]:
    """Lines ended by \\n alone: a progress bar's \\r stays inside its line."""
    parts = block.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]]
    return [*lines, parts[-1]] if parts[-1] else lines


class Courier:
    """Ships all files of an attempt on this node from a thread of its own. The kernel's counters lie under `root`."""

    def __init__(
        self, attempt_id: str, log_dir: Path, node_id: str, store: ObjectStore, root: Path = Path("/")
    ) -> None:
        self._root = root
        self._dir = node_log_dir(log_dir, attempt_id, node_id)
        self._attempt_id = attempt_id
        self._store = store
        self._shipments: dict[Path, LogShipment] = {}
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._flushes: list[threading.Event] = []
        self._lock = threading.Lock()
        self._oom_kills_before = num_oom_kills(root)
        remove_old_logs(log_dir, KEEP_LOGS_S)
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._thread.start()

    def flush(self, timeout_s: float) -> bool:
        """Ships everything written so far. Returns whether that was done in time."""
        done = threading.Event()
        with self._lock:
            self._flushes.append(done)
        self._wake.set()
        return done.wait(timeout_s)

    def close(self) -> None:
        """Ends the thread without shipping more."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def last_lines(self, stream: str, num_lines: int) -> tuple[str, ...]:
        """The end of one stream on this node."""
        return tail(log_path(self._dir, stream), num_lines)

    def num_oom_kills(self) -> int:
        """How many processes the kernel has killed on this node for lack of memory since the attempt came here."""
        now = num_oom_kills(self._root)
        return 0 if now is None or self._oom_kills_before is None else now - self._oom_kills_before

    def dump_stacks(self, pids: Collection[int]) -> None:
        """Asks our ranks among these processes to write the stacks of all their threads into their files (SIGUSR1)."""
        for pid in pids:
            try:
                if psutil.Process(pid).uids().real == os.getuid():
                    os.kill(pid, signal.SIGUSR1)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                flushes, self._flushes = self._flushes, []
            shipped = self._ship_all(final=bool(flushes))
            if shipped:
                for done in flushes:
                    done.set()
            else:
                with self._lock:
                    self._flushes.extend(flushes)
            self._wake.wait(_POLL_S if shipped or flushes else _PAUSE_AFTER_ERROR_S)
            self._wake.clear()

    def _ship_all(self, final: bool) -> bool:
        shipped = True
        for path in sorted(self._dir.glob("*.log")):
            try:
                shipment = self._shipments.setdefault(path, LogShipment(path, self._attempt_id, self._store))
                shipment.ship(time.monotonic(), final)
            except (StoreError, OSError) as error:
                log.warning("Output could not be shipped; it stays on the node.", stream=path.stem, error=str(error))
                shipped = False
            except Exception:
                # One stream's trouble must not end the others'.
                log.error("Output could not be read.", stream=path.stem, exc_info=True)
                shipped = False
        return shipped


def remove_old_logs(log_dir: Path, keep_s: float) -> None:
    """Removes directories of attempts whose files nobody has written to for `keep_s` seconds."""
    for directory in log_dir.glob("att_*"):
        try:
            newest = max((path.stat().st_mtime for path in directory.rglob("*")), default=directory.stat().st_mtime)
        except OSError:
            continue
        if time.time() - newest > keep_s:
            shutil.rmtree(directory, ignore_errors=True)


class NodeCourier:
    """A courier as an actor on a node other than the driver's, with that node's own settings."""

    def __init__(self, attempt_id: str, node_id: str) -> None:
        settings = load_node_settings()
        self._courier = Courier(attempt_id, settings.log_dir, node_id, open_store(settings))

    def flush(self, timeout_s: float) -> bool:
        return self._courier.flush(timeout_s)

    def last_lines(self, stream: str, num_lines: int) -> tuple[str, ...]:
        return self._courier.last_lines(stream, num_lines)

    def num_oom_kills(self) -> int:
        return self._courier.num_oom_kills()

    def dump_stacks(self, pids: Collection[int]) -> None:
        self._courier.dump_stacks(pids)


class Couriers:
    """All couriers of an attempt: the driver's own thread, and one actor on each other node."""

    def __init__(self, attempt_id: str, own: Courier, own_node_id: str) -> None:
        self._attempt_id = attempt_id
        self._own = own
        self._own_node_id = own_node_id
        self._actors: dict[str, Any] = {}

    def cover(self, node_ids: Collection[str]) -> None:
        """Starts a courier on each of these nodes that has none."""
        for node_id in node_ids:
            if node_id == self._own_node_id or node_id in self._actors:
                continue
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            placed = NodeAffinitySchedulingStrategy(node_id, soft=False)
            actor_class = ray.remote(num_cpus=0, scheduling_strategy=placed)(NodeCourier)
            self._actors[node_id] = actor_class.remote(self._attempt_id, node_id)

    def flush(self, timeout_s: float) -> None:
        """Ships everything written so far, on all nodes that answer in time."""
        pending = [actor.flush.remote(timeout_s) for actor in self._actors.values()]
        done = self._own.flush(timeout_s)
        if pending:
            import ray

            ready, _ = ray.wait(pending, num_returns=len(pending), timeout=timeout_s)
            done = done and len(ready) == len(pending)
        if not done:
            log.warning("Not all output could be shipped in time.")

    def last_lines(self, node_id: str, stream: str, num_lines: int) -> tuple[str, ...]:
        """The end of a rank's output; nothing if its node does not answer."""
        if node_id == self._own_node_id:
            return self._own.last_lines(stream, num_lines)
        lines: tuple[str, ...] = self._ask(node_id, "last_lines", stream, num_lines) or ()
        return lines

    def num_oom_kills(self, node_id: str) -> int:
        """How many processes the kernel has killed on a node for lack of memory; 0 if the node does not answer."""
        if node_id == self._own_node_id:
            return self._own.num_oom_kills()
        return int(self._ask(node_id, "num_oom_kills") or 0)

    def dump_stacks(self, node_id: str, pids: Collection[int]) -> None:
        """Makes ranks on a node write their threads' stacks into their output."""
        if node_id == self._own_node_id:
            self._own.dump_stacks(pids)
        else:
            self._ask(node_id, "dump_stacks", pids)

    def _ask(self, node_id: str, method: str, *arguments: Any) -> Any:
        actor = self._actors.get(node_id)
        if actor is None:
            return None
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return ray.get(getattr(actor, method).remote(*arguments), timeout=5.0)
        except (GetTimeoutError, RayError):
            return None
