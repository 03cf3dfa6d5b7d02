"""Is everything there that jobs need? And the cluster, as the controller last saw it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError

from configs.states import JobState
from orchestrator.schemas import Check, ClusterPublic, NodePublic, Readiness, SinkPublic
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.store import NotFound, ObjectStore, StoreError
from orchestrator.storage.tables import ClusterRow, JobRow, SinkRow

_LIVE = tuple(state for state in JobState if not state.is_terminal)
_FRESH_S = 2.0
_STALE_FACTOR = 2.0
"""A part not seen for so many leases counts as gone."""


class ReadinessProbe:
    """Looks at the database, the object store, the controller and the cluster; at most every two seconds, since anyone
    may ask."""

    def __init__(self, settings: Settings, db: Database, store: ObjectStore) -> None:
        self.settings = settings
        self.db = db
        self.store = store
        self._lock = threading.Lock()
        self._last: tuple[float, Readiness] | None = None

    def look(self) -> Readiness:
        """The state of every part. Never raises for a part that is away."""
        with self._lock:
            if self._last is None or time.monotonic() - self._last[0] > _FRESH_S:
                checks = (self._database(), self._store(), *self._controller_and_cluster(datetime.now(UTC)))
                ready = all(check.ok for check in checks if check.required)
                self._last = (time.monotonic(), Readiness(ready=ready, checks=checks))
            return self._last[1]

    def _database(self) -> Check:
        return _check("database", True, lambda: self._select_one())

    def _select_one(self) -> str:
        with self.db.reader() as session:
            session.execute(text("SELECT 1"))
        return "answers"

    def _store(self) -> Check:
        return _check("store", True, lambda: self._head())

    def _head(self) -> str:
        with contextlib.suppress(NotFound):
            self.store.head("readiness-probe")
        return "answers"

    def _controller_and_cluster(self, now: datetime) -> tuple[Check, Check]:
        stale = timedelta(seconds=self.settings.lease_s * _STALE_FACTOR)
        try:
            with self.db.reader() as session:
                row = session.get(ClusterRow, 1)
        except SQLAlchemyError:
            away = "the database does not answer"
            return _failed("controller", False, away), _failed("ray", False, away)
        if row is None or row.controller_at is None:
            controller = _failed("controller", False, "no controller has run yet: jobs wait")
        elif now - row.controller_at > stale:
            controller = _failed("controller", False, f"no sign since {row.controller_at.isoformat()}: jobs wait")
        else:
            controller = Check(name="controller", ok=True, message="runs", required=False)
        return controller, _ray_check(row, now, stale)


def get_cluster(db: Database) -> ClusterPublic:
    """The Ray cluster as the controller last saw it, the number of jobs in each state that has not ended, and sinks."""
    with db.reader() as session:
        row = session.get(ClusterRow, 1)
        counted = session.execute(
            select(JobRow.state, func.count()).where(JobRow.state.in_(_LIVE)).group_by(JobRow.state)
        )
        jobs = dict(counted.all())
        sinks = tuple(
            SinkPublic(name=sink.name, ok=sink.ok, message=sink.message, since=sink.since, seen_at=sink.seen_at)
            for sink in session.scalars(select(SinkRow).order_by(SinkRow.name))
        )
    if row is None:
        return ClusterPublic(
            cluster_id="",
            reachable=False,
            message="The controller has not looked at the cluster yet.",
            nodes=(),
            seen_at=None,
            controller_at=None,
            jobs=jobs,
            sinks=sinks,
        )
    return ClusterPublic(
        cluster_id=row.cluster_id,
        reachable=row.reachable,
        message=row.message,
        nodes=tuple(NodePublic.model_validate(node) for node in row.nodes),
        seen_at=row.seen_at,
        controller_at=row.controller_at,
        jobs=jobs,
        sinks=sinks,
    )


def _ray_check(row: ClusterRow | None, now: datetime, stale: timedelta) -> Check:
    if row is None:
        return _failed("ray", False, "not looked at yet")
    if not row.reachable:
        return _failed("ray", False, row.message or "cannot be reached: jobs wait")
    if now - row.seen_at > stale:
        return _failed("ray", False, f"not seen since {row.seen_at.isoformat()}")
    alive = sum(1 for node in row.nodes if node.get("alive"))
    return Check(name="ray", ok=True, message=f"{alive} nodes", required=False)


def _check(name: str, required: bool, look: Callable[[], str]) -> Check:
    try:
        return Check(name=name, ok=True, message=look(), required=required)
    except (SQLAlchemyError, StoreError) as error:
        # The class only: a message may hold addresses and user names, and this needs no token.
        return _failed(name, required, f"does not answer ({type(error).__name__})")


def _failed(name: str, required: bool, message: str) -> Check:
    return Check(name=name, ok=False, message=message, required=required)
