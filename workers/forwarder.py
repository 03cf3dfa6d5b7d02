"""Sends what the driver drained from its hub to the control plane, from a thread of its own: the driver's loop, which
watches the ranks, never waits for the network."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path

import structlog

from configs.states import Desired
from configs.wire import ClaimRequest, Heartbeat, MetricPoint, ReportBatch, WorkerEvent, to_columns
from workers.control_plane import ControlPlane, Refused, Spool, Superseded, Unreachable
from workers.hub import Drained

log = structlog.get_logger(__name__)
MAX_METRICS_PER_BATCH = 2_000
MAX_EVENTS_PER_BATCH = 200
INTERVAL_S = 1.0
MAX_PAUSE_S = 15.0


class Forwarder:
    """One attempt's reports. `desired` and `is_fenced` are what the control plane last said; before it answers: run."""

    def __init__(
        self,
        control_plane: ControlPlane,
        claim: ClaimRequest,
        spool_dir: Path,
        total_steps: int | None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._control_plane = control_plane
        self._claim = claim
        self._spool = Spool(spool_dir)
        self._total_steps = total_steps
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._heartbeats: dict[int, Heartbeat] = {}
        self._metrics: deque[MetricPoint] = deque()
        self._events: deque[WorkerEvent] = deque()
        self._checkpoints: list[str] = []
        self._seq = 0
        self._is_claimed = False
        self._pause_s = interval_s
        self._finishing = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="forwarder", daemon=True)
        self.desired = Desired.RUN
        self.is_fenced = False
        self.is_reachable = True

    def claim(self, deadline_s: float) -> None:
        """Tries to claim the attempt for so many seconds; while the control plane stays away the claim is repeated
        before the first report. Sets `is_fenced` if another driver has it."""
        until = time.monotonic() + deadline_s
        while not self._try_claim() and not self.is_fenced and time.monotonic() < until:
            self._wake.wait(min(self._pause_s, 1.0))

    def start(self) -> None:
        self._thread.start()

    def put(self, drained: Drained) -> None:
        """Takes what one drain brought. Heartbeats replace each other; everything else is kept."""
        with self._lock:
            self._heartbeats = dict(drained.heartbeats)
            self._metrics.extend(drained.metrics)
            self._events.extend(drained.events)
            self._checkpoints.extend(drained.checkpoints)

    def finish(self, timeout_s: float) -> bool:
        """Sends what is left, the last batch marked `finished`. Returns whether all of it arrived in time."""
        self._finishing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive() and not self._spool

    def _run(self) -> None:
        is_last_made = False
        while not self.is_fenced:
            finishing = self._finishing.is_set()
            batches = [] if is_last_made else self._take(finished=finishing)
            is_last_made = finishing
            try:
                self._deliver(batches)
            except Exception:
                # Nothing known ends here; if something does, these reports may be lost, reporting must not be.
                log.error("Reports could not be handled.", exc_info=True)
            if finishing and not self._spool:
                return
            self._wake.wait(self._interval_s if self.is_reachable else self._pause_s)
            self._wake.clear()

    def _take(self, finished: bool) -> list[ReportBatch]:
        """Batches of everything that waits in memory; at least one, because orders come in the reply."""
        batches: list[ReportBatch] = []
        with self._lock:
            while True:
                metrics = [self._metrics.popleft() for _ in range(min(len(self._metrics), MAX_METRICS_PER_BATCH))]
                events = [self._events.popleft() for _ in range(min(len(self._events), MAX_EVENTS_PER_BATCH))]
                is_last = not self._metrics and not self._events
                self._seq += 1
                batches.append(
                    ReportBatch(
                        seq=self._seq,
                        total_steps=self._total_steps,
                        heartbeats=tuple(self._heartbeats.values()) if is_last else (),
                        columns=to_columns(metrics),
                        events=tuple(events),
                        checkpoints=tuple(self._checkpoints) if is_last else (),
                        finished=finished and is_last,
                    )
                )
                if is_last:
                    self._checkpoints = []
                    return batches

    def _deliver(self, batches: list[ReportBatch]) -> None:
        """Sends what lies on disk, then these; what cannot be sent is put on disk. Always in order of `seq`."""
        try:
            if not self._is_claimed and not self._try_claim():
                raise Unreachable("the attempt is not claimed yet")
            while (waiting := self._spool.first()) is not None:
                self._send(waiting)
                self._spool.remove(waiting.seq)
            while batches:
                self._send(batches[0])
                batches.pop(0)
        except Superseded as error:
            self._fence(error)
        except Unreachable as error:
            self._note_absence(error)
            for batch in batches:
                # Heartbeats alone are worth nothing later.
                if batch.num_points or batch.events or batch.checkpoints or batch.finished:
                    self._spool.add(batch)
        else:
            if not self.is_reachable:
                log.info("The control plane is back.")
            self.is_reachable = True
            self._pause_s = self._interval_s

    def _send(self, batch: ReportBatch) -> None:
        try:
            self.desired = self._control_plane.report(batch).desired
        except Refused as error:
            log.error("A report was refused and is dropped.", seq=batch.seq, error=str(error))

    def _try_claim(self) -> bool:
        try:
            self.desired = self._control_plane.claim(self._claim).desired
            self._is_claimed = True
        except Superseded as error:
            self._fence(error)
        except Refused as error:
            log.error("The claim was refused; training goes on.", error=str(error))
        except Unreachable as error:
            self._note_absence(error)
        return self._is_claimed

    def _fence(self, error: Superseded) -> None:
        log.error("This attempt is superseded.", error=str(error))
        self.is_fenced = True

    def _note_absence(self, error: Unreachable) -> None:
        if self.is_reachable:
            log.warning(
                "The control plane cannot be reached; training goes on, reports wait on disk.", error=str(error)
            )
        self.is_reachable = False
        self._pause_s = min(self._pause_s * 2, MAX_PAUSE_S)
