"""Event files for TensorBoard in the object store, under the job's prefix.

An object store cannot append. A job's newest file is written anew with what has come, until it is SEAL_BYTES long; then
the next one is begun. To TensorBoard that looks like a file that grows: what it has read of it never changes, because
the bytes depend on the points alone. Few and large files are what it reads well from an object store; one small file
per look would be thousands of them.

Each attempt begins a file of its own, which begins by saying at which step the attempt went on (a session's start,
`purge_step` in the writers of TensorBoard): TensorBoard drops what earlier files hold at and beyond that step.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import groupby
from typing import Any

import google_crc32c

from configs.layout import event_file_key
from configs.states import JobState
from orchestrator.control.sinks.sink import Delivery, SinkJob, SinkRefused, SinkUnavailable, missing_package
from orchestrator.storage.arrivals import Arrival
from orchestrator.storage.store import NotFound, ObjectStore, StoreError, StoreRefused

SEAL_BYTES = 1024 * 1024
_MASK = 0xA282EAD8


class TensorBoardSink:
    """Writes event files into `store`."""

    name = "tensorboard"
    takes_back = True
    secrets: tuple[str, ...] = ()

    def __init__(self, store: ObjectStore, every_s: float, seal_bytes: int = SEAL_BYTES) -> None:
        self.every_s = every_s
        self._store, self._seal_bytes = store, seal_bytes

    def prepare(self) -> None:
        try:
            import tensorboardX.proto.event_pb2  # noqa: F401
        except ImportError:
            raise missing_package(self.name, "tensorboardX", "server") from None

    def write(self, delivery: Delivery) -> dict[str, Any]:
        """Memory: attempt, part and length of the newest file."""
        memory = dict(delivery.memory)
        try:
            for attempt, points in groupby(delivery.points, key=lambda point: point.attempt):
                memory = self._write_attempt(delivery, attempt, list(points), memory)
            if delivery.final and memory:
                at = delivery.job.ended_at or delivery.job.created_at
                end = _record(_event(at, summary=_session_end(delivery.job)))
                memory = self._append(delivery.job.id, memory, end, at)
        except StoreRefused as error:
            raise SinkRefused(str(error)) from error
        except StoreError as error:
            raise SinkUnavailable(str(error)) from error
        return memory

    def _write_attempt(
        self, delivery: Delivery, attempt: int, points: list[Arrival], memory: dict[str, Any]
    ) -> dict[str, Any]:
        head = b""
        if attempt != memory.get("attempt"):
            head = _attempt_head(delivery, attempt, points[0].at, memory.get("attempt"))
            memory = {"attempt": attempt, "part": 0, "num_bytes": 0}
        for body in _cut(_encode(points), self._seal_bytes, already=memory["num_bytes"] + len(head)):
            memory = self._append(delivery.job.id, memory, head + body, points[0].at)
            head = b""
            if memory["num_bytes"] >= self._seal_bytes:
                memory = {"attempt": attempt, "part": memory["part"] + 1, "num_bytes": 0}
        return memory

    def _append(self, job_id: str, memory: Mapping[str, Any], data: bytes, at: datetime) -> dict[str, Any]:
        """Put `data` behind the bytes of the newest file that are known to be there: no more of it counts."""
        attempt, part, num_bytes = memory["attempt"], memory["part"], memory["num_bytes"]
        before = b""
        if num_bytes:
            try:
                before = self._store.get(event_file_key(job_id, attempt, part))[:num_bytes]
            except NotFound:
                before = b""
            if len(before) < num_bytes:
                # Somebody deleted it. What was in it is in the database; here, go on behind it.
                before, part = b"", part + 1
        whole = (before or _record(_event(at, file_version="brain.Event:2"))) + data
        self._store.put(event_file_key(job_id, attempt, part), whole)
        return {"attempt": attempt, "part": part, "num_bytes": len(whole)}


def _attempt_head(delivery: Delivery, attempt: int, at: datetime, before: int | None) -> bytes:
    """What the first file of an attempt begins with: the step from which everything earlier is void; of the job's first
    file also its parameters."""
    from tensorboardX.proto.event_pb2 import SessionLog

    # TensorBoard takes the first start of a run as its beginning, and drops steps from the second one on.
    kept = min(step for number, step in delivery.from_steps.items() if (before or 0) < number <= attempt)
    start = _record(_event(at, step=kept + 1, session_log=SessionLog(status=SessionLog.START)))
    if before is not None:
        return start
    return start + _record(_event(delivery.job.created_at, summary=_session_start(delivery.job)))


def _encode(points: list[Arrival]) -> Iterator[bytes]:
    """A record for each step of each report."""
    from tensorboardX.proto.summary_pb2 import Summary

    ordered = sorted(points, key=lambda point: (point.place, point.step, point.name))
    for (_, step), group in groupby(ordered, key=lambda point: (point.place, point.step)):
        same = list(group)
        values = [
            Summary.Value(tag=p.name, simple_value=float("nan") if p.value is None else _float32(p.value)) for p in same
        ]
        yield _record(_event(same[0].at, step=step, summary=Summary(value=values)))


def _float32(value: float) -> float:
    """Event files hold single precision; what is too large for it is infinite there."""
    try:
        struct.pack("<f", value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    return value


def _cut(records: Iterator[bytes], seal_bytes: int, already: int) -> Iterator[bytes]:
    """The records joined into pieces that end when a file is full; it begins with `already` bytes."""
    pieces: list[bytes] = []
    size = already
    for record in records:
        pieces.append(record)
        size += len(record)
        if size >= seal_bytes:
            yield b"".join(pieces)
            pieces, size = [], 0
    if pieces:
        yield b"".join(pieces)


def _event(at: datetime, **fields: Any) -> bytes:
    from tensorboardX.proto.event_pb2 import Event

    data: bytes = Event(wall_time=at.timestamp(), **fields).SerializeToString(deterministic=True)
    return data


def _record(data: bytes) -> bytes:
    """TFRecord: length, its checksum, data, its checksum (tensorflow/core/lib/io/record_writer.cc)."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked(length)) + data + struct.pack("<I", _masked(data))


def _masked(data: bytes) -> int:
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


# -- TensorBoard's table of hyperparameters ----------------------------------------------------------------------------
def _session_start(job: SinkJob) -> Any:
    from tensorboardX.summary import hparams

    # Without the summary that lists hyperparameters and metrics TensorBoard finds them itself: the metrics of an
    # evaluation that is still to come too.
    _, start, _ = hparams({"name": job.name, **job.parameters()}, {})
    return start


_STATUS = {JobState.SUCCEEDED: "STATUS_SUCCESS", JobState.FAILED: "STATUS_FAILURE"}


def _session_end(job: SinkJob) -> Any:
    from tensorboardX.proto.api_pb2 import Status
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

    ended_at = job.ended_at.timestamp() if job.ended_at is not None else 0.0
    info = SessionEndInfo(status=Status.Value(_STATUS.get(job.state, "STATUS_UNKNOWN")), end_time_secs=ended_at)
    content = HParamsPluginData(session_end_info=info, version=0).SerializeToString(deterministic=True)
    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content)
    return Summary(
        value=[Summary.Value(tag="_hparams_/session_end_info", metadata=SummaryMetadata(plugin_data=plugin))]
    )
