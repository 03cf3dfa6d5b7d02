"""What Prometheus scrapes: the service as the database has it, and the requests of this process, or of all that share
its port.

Numbers of the service are read at each scrape and are the same from every API process: take them with max(), not sum().
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from configs.states import AttemptState, Desired, JobState
from orchestrator.storage.db import Database
from orchestrator.storage.tables import AttemptRow, ClusterRow, JobRow

CONTENT_TYPE = CONTENT_TYPE_LATEST
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Exposition:
    """The registry of one API process, or of several: then `multiprocess_dir` is where prometheus_client keeps what
    each of them has counted (PROMETHEUS_MULTIPROC_DIR), and what is a process's own is left out."""

    def __init__(self, db: Database, multiprocess_dir: str | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ServiceCollector(db))
        if multiprocess_dir is None:
            for part in (ProcessCollector, PlatformCollector, GCCollector):
                part(registry=self._registry)
        else:
            MultiProcessCollector(self._registry, multiprocess_dir)  # type: ignore[no-untyped-call]
        self._latency = Histogram(
            "patchwork_http_request_duration_seconds",
            "From a request to the first byte of its answer, by route.",
            ("method", "route", "status"),
            buckets=_SECONDS,
            # Of several processes the collector above tells the sum.
            registry=self._registry if multiprocess_dir is None else None,
        )

    def observe(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count a request. `route` is the template, such as /v1/jobs/{job_id}; None: no route matched. Neither paths
        nor methods that clients make up become labels."""
        known = method if method in _METHODS else "other"
        self._latency.labels(known, route or "unmatched", str(status)).observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format. Raises SQLAlchemyError."""
        return generate_latest(self._registry)


class _ServiceCollector(Collector):
    def __init__(self, db: Database) -> None:
        self._db = db

    def collect(self) -> Iterable[Metric]:
        with self._db.reader() as session:
            return [*_jobs(session), *_attempts(session), *_usage(session), *_cluster(session)]


def _jobs(session: Session) -> Iterable[Metric]:
    counted = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state)).all()
    numbers = dict.fromkeys((state.value for state in JobState), 0) | dict(counted)
    jobs = GaugeMetricFamily("patchwork_jobs", "Jobs, by state.", labels=["state"])
    for state, count in numbers.items():
        jobs.add_metric([state], count)
    yield jobs
    waiting = (JobRow.state == JobState.QUEUED, JobRow.desired == Desired.RUN)
    length, oldest = session.execute(select(func.count(), func.min(JobRow.state_since)).where(*waiting)).one()
    yield GaugeMetricFamily("patchwork_queue_length", "Jobs that wait for their turn.", length)
    age = max(0.0, (datetime.now(UTC) - oldest).total_seconds()) if oldest is not None else 0.0
    yield GaugeMetricFamily("patchwork_queue_oldest_seconds", "How long the first of them has waited.", age)


def _attempts(session: Session) -> Iterable[Metric]:
    live = select(AttemptRow.state, func.count()).where(AttemptRow.state != AttemptState.ENDED)
    numbers = {state.value: 0 for state in AttemptState if state is not AttemptState.ENDED}
    numbers |= dict(session.execute(live.group_by(AttemptRow.state)).all())
    attempts = GaugeMetricFamily("patchwork_attempts", "Attempts that have not ended, by state.", labels=["state"])
    for state, count in numbers.items():
        attempts.add_metric([state], count)
    yield attempts
    ended = select(AttemptRow.exit_reason, func.count()).where(AttemptRow.state == AttemptState.ENDED)
    reasons = CounterMetricFamily("patchwork_attempts_ended", "Attempts that ended, by reason.", labels=["reason"])
    for reason, count in session.execute(ended.group_by(AttemptRow.exit_reason)):
        reasons.add_metric([reason or "unknown"], count)
    yield reasons


def _usage(session: Session) -> Iterable[Metric]:
    sums = select(func.sum(JobRow.gpu_seconds), func.sum(JobRow.wasted_gpu_s), func.sum(JobRow.wasted_steps))
    # What a search used is what its trials used.
    used, wasted, steps = session.execute(sums.where(JobRow.kind != "search")).one()
    yield CounterMetricFamily("patchwork_device_seconds", "Wall seconds x devices of ended attempts.", float(used or 0))
    yield CounterMetricFamily("patchwork_wasted_device_seconds", "Those of steps done again.", float(wasted or 0))
    yield CounterMetricFamily(
        "patchwork_wasted_steps", "Steps that were done again after a restart.", float(steps or 0)
    )


def _cluster(session: Session) -> Iterable[Metric]:
    row = session.get(ClusterRow, 1)
    reachable = row is not None and row.reachable
    yield GaugeMetricFamily("patchwork_cluster_reachable", "Whether Ray answered the controller.", float(reachable))
    alive = [node for node in (row.nodes if row is not None else ()) if node.get("alive")]
    yield GaugeMetricFamily("patchwork_cluster_nodes", "Nodes of the Ray cluster that are alive.", len(alive))
    gpus = sum(float(node.get("gpus", 0)) for node in alive)
    yield GaugeMetricFamily("patchwork_cluster_gpus", "Their GPUs.", gpus)
    at = row.controller_at.timestamp() if row is not None and row.controller_at is not None else 0.0
    yield GaugeMetricFamily(
        "patchwork_controller_last_loop_timestamp_seconds", "The leading controller's last loop.", at
    )
