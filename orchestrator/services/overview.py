"""The service at a glance: the cluster and what is used of it, what runs, who waits, what failed, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from configs.states import JobState
from orchestrator.control.queue_view import load_reservations
from orchestrator.schemas import ClusterPublic, JobPublic
from orchestrator.services.health import get_cluster
from orchestrator.services.jobs import publish
from orchestrator.storage.db import Database
from orchestrator.storage.tables import CheckpointRow, JobRow
from orchestrator.view_schemas import Devices, OverviewPublic, StorageUse

NUM_SHOWN = 20
FAILED_WITHIN = timedelta(days=7)
_NO_TRIAL = JobRow.search_id.is_(None)
"""Trials are their search's."""
_ACTIVE = tuple(state for state in JobState if state.holds_resources)


def read_overview(db: Database, now: datetime | None = None) -> OverviewPublic:
    """What there is to know now: at most `NUM_SHOWN` jobs of each kind of list, the numbers of all."""
    now = now or datetime.now(UTC)
    cluster = get_cluster(db)
    with db.reader() as session:
        by_state = select(JobRow.state, func.count()).where(_NO_TRIAL).group_by(JobRow.state)
        counted = dict(session.execute(by_state).all())
        active = _jobs(session, _ACTIVE)
        queued = sorted(_jobs(session, (JobState.QUEUED,), ordered=True), key=_place)
        ended = select(JobRow).where(_NO_TRIAL, JobRow.state == JobState.FAILED, JobRow.ended_at > now - FAILED_WITHIN)
        failed = publish(session, list(session.scalars(ended.order_by(JobRow.ended_at.desc()).limit(5))))
        return OverviewPublic(
            cluster=cluster,
            devices=_devices(session, cluster),
            counts={state.value: counted.get(state.value, 0) for state in JobState},
            active=tuple(active),
            queued=tuple(queued),
            failed=tuple(failed),
            storage=_storage(session),
        )


def _jobs(session: Session, states: Sequence[JobState], *, ordered: bool = False) -> list[JobPublic]:
    query = select(JobRow).where(_NO_TRIAL, JobRow.state.in_(states)).limit(NUM_SHOWN)
    if ordered:
        query = query.order_by(JobRow.priority.desc(), JobRow.created_at)
    else:
        query = query.order_by(JobRow.started_at.desc(), JobRow.id)
    return publish(session, list(session.scalars(query)))


def _place(job: JobPublic) -> float:
    return job.queue.position if job.queue is not None else float("inf")


def _devices(session: Session, cluster: ClusterPublic) -> Devices:
    alive = [node for node in cluster.nodes if node.alive] if cluster.reachable else []
    held = load_reservations(session)
    return Devices(
        cpus=sum(node.cpus for node in alive),
        gpus=sum(node.gpus for node in alive),
        cpus_used=sum(r.world_size * r.worker.cpus for r in held),
        gpus_used=sum(r.world_size * r.worker.gpus for r in held),
    )


def _storage(session: Session) -> StorageUse:
    kept = select(func.count(), func.coalesce(func.sum(CheckpointRow.num_bytes), 0))
    number, num_bytes = session.execute(kept.where(CheckpointRow.deleted_at.is_(None))).one()
    return StorageUse(num_checkpoints=number, num_bytes=int(num_bytes))
