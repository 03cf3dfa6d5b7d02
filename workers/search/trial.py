"""One attempt of a trial under way: the same steps as workers/driver.py's, one look at a time.

The search's driver has many of these. What a look finds is passed on at once; what takes time (the last words of an
attempt that has ended: output, reports, exit.json, the control plane's answer) is done by `close`, from another thread,
after the workers were freed.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from ray.exceptions import GetTimeoutError, RayError

from configs.reasons import ExitReason
from configs.search_wire import TrialEnded, TrialRecord
from configs.states import Desired
from configs.wire import AttemptFile, ClaimRequest
from workers.control_plane import ControlPlane, Refused, SearchPlane, Superseded, Unreachable
from workers.courier import Courier, Couriers
from workers.diagnosis import Evidence, Verdict
from workers.driver import FINAL_REPORT_S, Run, evidence_of, forward_reports, is_node_alive, watch_progress, write_exit
from workers.forwarder import Forwarder
from workers.node import NodeSettings
from workers.search.group import TrialWorkerGroup
from workers.search.hub import TrialHub
from workers.search.tune import TuneTrial
from workers.store import ObjectStore
from workers.worker_group import GroupEnd

log = structlog.get_logger(__name__)
_AGAIN_S = 1.0


@dataclass(frozen=True)
class Place:
    """What every trial of a driver shares."""

    settings: NodeSettings
    store: ObjectStore
    plane: SearchPlane
    start_hub: Callable[[], Any]
    """Starts a SearchHub beside the driver."""
    node_id: str
    scratch: Path
    claim: ClaimRequest
    terminated: threading.Event


class NotPlaced:
    """Stands for the worker group of a trial that has no workers yet."""

    def start(self) -> None:
        pass

    def wait_first_failure(self, timeout_s: float) -> GroupEnd | None:  # noqa: ARG002
        return None

    def stop(self) -> None:
        pass


@dataclass
class TrialRun:
    """A trial's attempt, from the moment it was written down until it is closed."""

    record: TrialRecord
    attempt: AttemptFile
    tune_trial: TuneTrial
    run: Run
    courier: Courier
    hub: TrialHub
    plane: ControlPlane
    """The line of this attempt's reports."""
    metric: str
    points: list[tuple[int, float]] = field(default_factory=list)
    """Of the metric, by step: those known before this attempt, then this one's."""
    stop_message: str | None = None
    """Why the search stopped it."""
    start_error: str | None = None
    """Why its first process could not be started."""
    has_lost_hub: bool = False
    placed_at: float | None = None
    freed_at: float | None = None

    def place(self, group: TrialWorkerGroup) -> None:
        """Its workers are there: the ranks begin."""
        self.run.group = group
        self.run.started_at = self.placed_at = time.monotonic()
        group.start()

    def look(self) -> tuple[list[tuple[int, float]], Evidence | None]:
        """Passes on what came from the ranks. Returns the metric's new points, and everything known of the attempt's
        end once it must end."""
        if self.placed_at is None:
            return [], self._look_unplaced()
        group_end = self.run.group.wait_first_failure(0.0)
        try:
            forward_reports(self.run)
            evidence = watch_progress(self.run, group_end)
        except (RayError, GetTimeoutError) as error:
            self.has_lost_hub = True
            return [], evidence_of(self.run, group_end=GroupEnd(error=f"The hub is gone: {error}"))
        return self._new_points(), evidence

    def _look_unplaced(self) -> Evidence | None:
        self.run.order = self.run.forwarder.desired
        if self.run.forwarder.is_fenced:
            return evidence_of(self.run, fenced=True)
        if self.run.order is not Desired.RUN:
            return evidence_of(self.run)
        if self.start_error is not None:
            return evidence_of(self.run, group_end=GroupEnd(error=self.start_error, died_starting=True))
        limit_s = self.run.settings.start_timeout_s
        if self.run.clock() - self.run.started_at > limit_s:
            error = f"There was no place for its workers within {limit_s:.0f} s."
            return evidence_of(self.run, group_end=GroupEnd(error=error, timed_out_start=True))
        return None

    def _new_points(self) -> list[tuple[int, float]]:
        last = self.points[-1][0] if self.points else -1
        found = sorted(
            (point.step, point.value)
            for point in self.run.drained.metrics
            if point.name == self.metric and point.value is not None
        )
        # What a resumed attempt does once more was judged before.
        return [(step, value) for step, value in found if step > last]

    @property
    def worker_seconds(self) -> float:
        """Workers held times seconds, so far."""
        if self.placed_at is None:
            return 0.0
        return ((self.freed_at or time.monotonic()) - self.placed_at) * self.attempt.world_size

    def close(self, evidence: Evidence, place: Place) -> TrialEnded | None:
        """Says the attempt's last words, until they were heard. None if this driver may not speak any more."""
        verdict = None
        if self.stop_message is not None:
            verdict = Verdict(ExitReason.STOPPED_EARLY, self.stop_message)
        exit_file = write_exit(self.run, evidence, verdict)
        # Its value counts only if it arrived.
        while not self.run.forwarder.is_fenced and not self.run.forwarder.finish(FINAL_REPORT_S):
            log.warning("A trial's last reports could not be delivered yet.", trial=self.record.number)
        self.courier.close()
        self.hub.forget()
        self.plane.close()
        shutil.rmtree(place.scratch / self.attempt.attempt_id, ignore_errors=True)
        while exit_file is not None:
            try:
                return place.plane.end(self.record.number, exit_file)
            except Unreachable as error:
                log.warning("A trial's end could not be told yet.", trial=self.record.number, error=str(error))
                time.sleep(_AGAIN_S)
            except (Superseded, Refused) as error:
                log.error("A trial's end was refused.", trial=self.record.number, error=str(error))
                break
        return None


def open_trial(record: TrialRecord, attempt: AttemptFile, metric: str, hub_actor: Any, place: Place) -> TrialRun:
    """A trial's attempt, claimed in the background, before it has workers."""
    resources = attempt.spec["resources"]
    bundle = {"CPU": float(resources["cpus_per_worker"])}
    if resources["gpus_per_worker"]:
        bundle["GPU"] = float(resources["gpus_per_worker"])
        if resources.get("accelerator"):
            bundle[f"accelerator_type:{resources['accelerator']}"] = 0.001
    attempt_id = attempt.attempt_id
    plane = ControlPlane(place.settings.api_url, place.settings.worker_secret.get_secret_value(), attempt_id)
    spool = place.scratch / attempt_id
    forwarder = Forwarder(plane, place.claim, spool, record.total_steps)
    forwarder.start()
    courier = Courier(attempt_id, place.settings.log_dir, place.node_id, place.store)
    hub = TrialHub(hub_actor, attempt_id)
    couriers = Couriers(attempt_id, courier, place.node_id)
    run = Run(attempt, place.settings, place.store, hub, NotPlaced(), forwarder, couriers, is_node_alive)
    run.terminated = place.terminated
    tune_trial = TuneTrial(attempt_id, [dict(bundle) for _ in range(attempt.world_size)])
    return TrialRun(record, attempt, tune_trial, run, courier, hub, plane, metric, list(record.curve))
