"""The driver's line to the control plane: claim the attempt, report, take orders.

An absent control plane never fails training: reports wait on disk, bounded, and are sent in order when it returns.
A control plane that answers "superseded" ends the attempt.

    ControlPlaneError
    ├── Superseded    409 or 410: a newer attempt took over, or this one has ended
    ├── Refused       the report itself is wrong (400, 413, 422): sending it again would not help
    └── Unreachable   anything else: no answer, 5xx, a proxy's error, an answer that cannot be read
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import httpx
import structlog
from pydantic import BaseModel, ValidationError

from configs.search_wire import SearchLimits, SearchState, TrialBegun, TrialCreate, TrialEnd, TrialEnded, TrialRecord
from configs.wire import ClaimReply, ClaimRequest, ExitFile, ReportBatch, ReportReply, to_columns

log = structlog.get_logger(__name__)
Reply = TypeVar("Reply", bound=BaseModel)
SPOOL_BYTES = 64 * 1024 * 1024


class ControlPlaneError(Exception):
    """Base of what a call to the control plane raises."""


class Superseded(ControlPlaneError):
    """This attempt is no longer the job's."""


class Refused(ControlPlaneError):
    """The control plane will never accept this report."""


class Unreachable(ControlPlaneError):
    """No usable answer; try again later."""


class ControlPlane:
    """The two calls every driver makes."""

    def __init__(self, api_url: str, worker_secret: str, attempt_id: str, timeout_s: float = 10.0) -> None:
        self._path = f"/internal/v1/attempts/{attempt_id}"
        self._client = httpx.Client(
            base_url=api_url,
            headers={"Authorization": f"Bearer {worker_secret}"},
            timeout=httpx.Timeout(timeout_s, connect=3.0),
            # A proxy of the environment is for the outside world.
            trust_env=False,
        )

    def claim(self, request: ClaimRequest) -> ClaimReply:
        """Takes the attempt for this driver. The same nonce may claim again. Raises ControlPlaneError."""
        return self._post(ClaimReply, "claim", request)

    def report(self, batch: ReportBatch) -> ReportReply:
        """Sends a batch; one that was received before changes nothing. Raises ControlPlaneError."""
        return self._post(ReportReply, "reports", batch)

    def close(self) -> None:
        self._client.close()

    def _post(self, reply_type: type[Reply], action: str, body: BaseModel | None = None) -> Reply:
        content = b"" if body is None else body.model_dump_json().encode()
        return self._ask(reply_type, "POST", action, content)

    def _ask(self, reply_type: type[Reply], method: str, action: str, content: bytes = b"") -> Reply:
        try:
            reply = self._client.request(
                method, f"{self._path}/{action}", content=content, headers={"Content-Type": "application/json"}
            )
        except httpx.HTTPError as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        text = f"{reply.status_code}: {reply.text[:500]}"
        if reply.status_code in (409, 410):
            raise Superseded(text)
        if reply.status_code in (400, 413, 422):
            raise Refused(text)
        if not reply.is_success:
            raise Unreachable(text)
        try:
            return reply_type.model_validate_json(reply.content)
        except ValidationError as error:
            # Some other server's page (a proxy's, a portal's): whatever was sent has not arrived.
            raise Unreachable(f"no {reply_type.__name__}: {text}") from error


class SearchPlane(ControlPlane):
    """What the driver of a search asks besides. Every call may be repeated, and raises ControlPlaneError."""

    def state(self) -> SearchState:
        return self._ask(SearchState, "GET", "search")

    def limits(self) -> SearchLimits:
        return self._ask(SearchLimits, "GET", "search/limits")

    def create(self, trial: TrialCreate) -> TrialRecord:
        return self._post(TrialRecord, "trials", trial)

    def begin(self, number: int) -> TrialBegun:
        return self._post(TrialBegun, f"trials/{number}/begin")

    def end(self, number: int, exit_file: ExitFile) -> TrialEnded:
        return self._post(TrialEnded, f"trials/{number}/end", TrialEnd(exit=exit_file))


class Spool:
    """Batches waiting on disk, in order of `seq`; those that the disk does not take (it is full) wait in memory. When
    they outgrow their bound the oldest metrics are thinned, every second point of a batch at a time; events and
    checkpoints are kept."""

    def __init__(self, directory: Path, max_bytes: int = SPOOL_BYTES) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._dir = directory
        self._max_bytes = max_bytes
        self._sizes: dict[int, int] = {}
        self._in_memory: dict[int, bytes] = {}
        for path in sorted(directory.glob("*.json")):
            self._sizes[int(path.stem)] = path.stat().st_size

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, batch: ReportBatch) -> None:
        self._write(batch)
        self._thin()

    def first(self) -> ReportBatch | None:
        """The oldest batch. One that the disk does not give back is dropped: it must not hold up the others."""
        while self._sizes:
            seq = min(self._sizes)
            try:
                return self._read(seq)
            except (OSError, ValueError) as error:
                log.error("A report that waited on disk is lost.", seq=seq, error=str(error))
                self.remove(seq)
        return None

    def remove(self, seq: int) -> None:
        self._sizes.pop(seq)
        self._in_memory.pop(seq, None)
        self._path(seq).unlink(missing_ok=True)

    def _thin(self) -> None:
        """From the oldest batch on, until the spool fits or holds no metrics and no heartbeats any more."""
        for seq in sorted(self._sizes):
            while sum(self._sizes.values()) > self._max_bytes:
                batch = self._read(seq)
                if not batch.num_points and not batch.heartbeats:
                    break
                columns = (*batch.columns, *to_columns(batch.metrics))
                # Only the latest heartbeats mean anything; half of one point is none.
                kept = tuple(c.thinned() for c in columns) if any(len(c) > 1 for c in columns) else ()
                self._write(batch.model_copy(update={"columns": kept, "metrics": (), "heartbeats": ()}))

    def _write(self, batch: ReportBatch) -> None:
        data = batch.model_dump_json().encode()
        temporary = self._dir / f"{batch.seq}.new"
        try:
            temporary.write_bytes(data)
            temporary.replace(self._path(batch.seq))
        except OSError as error:
            if not self._in_memory:
                log.warning("Reports wait in memory: the disk does not take them.", error=str(error))
            self._in_memory[batch.seq] = data
            # A part of it may lie there and take the room that others need.
            with suppress(OSError):
                temporary.unlink()
        else:
            self._in_memory.pop(batch.seq, None)
        self._sizes[batch.seq] = len(data)

    def _read(self, seq: int) -> ReportBatch:
        return ReportBatch.model_validate_json(self._in_memory.get(seq) or self._path(seq).read_bytes())

    def _path(self, seq: int) -> Path:
        return self._dir / f"{seq:010d}.json"
