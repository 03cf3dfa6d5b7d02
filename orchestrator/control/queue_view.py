"""The scheduler's view of queue and cluster, read from the database; and the scheduler's step, which writes go-aheads.

The API reads the same view, so what it tells a waiting user is what the scheduler goes by.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

import structlog
from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from configs.reasons import ExitReason
from configs.service import Resources
from configs.states import AttemptState, Desired, JobState
from orchestrator.control.launcher import ClusterStatus, NodeInfo
from orchestrator.control.scheduling import (
    ClusterView,
    Reservation,
    RunningSearch,
    Start,
    Wait,
    WaitingJob,
    Worker,
    schedule,
    share_places,
)
from orchestrator.storage.db import Database, upsert
from orchestrator.storage.events import SCHEDULER, lock_job, record
from orchestrator.storage.tables import AttemptRow, ClusterRow, JobRow, SearchRow

log = structlog.get_logger(__name__)
CLUSTER_ROW_ID = 1
_WITHOUT_SUCCESS = frozenset(state for state in JobState if state.is_terminal and state is not JobState.SUCCEEDED)
_HOLDING = [state for state in JobState if state.holds_resources]


class Needs(NamedTuple):
    """What a spec asks of the cluster."""

    worker: Worker
    world_sizes: tuple[int, ...]
    depends_on: tuple[str, ...]
    per_trial: int
    """Of a search: workers of a trial."""


class _Queued(NamedTuple):
    """Of a waiting job's row, what the scheduler goes by: rows whole, with their plans, take ten times as long."""

    id: str
    priority: int
    created_at: datetime
    not_before: datetime | None
    init_from: str | None
    spec_json: bytes


class _Search(NamedTuple):
    """A search that runs, with its attempt."""

    id: str
    spec_json: bytes
    attempt: int
    world_size: int
    places: int | None
    slots: int | None


_QUEUED = [JobRow.id, JobRow.priority, JobRow.created_at, JobRow.not_before, JobRow.init_from, JobRow.spec_json]


def load_view(session: Session, now: datetime) -> ClusterView:
    """Queue, reservations and nodes as the database has them."""
    cluster = session.get(ClusterRow, CLUSTER_ROW_ID)
    reachable = cluster is not None and cluster.reachable
    nodes = tuple(NodeInfo.model_validate(node) for node in cluster.nodes) if cluster and reachable else None
    waiting = select(*_QUEUED).where(
        JobRow.state == JobState.QUEUED, JobRow.start_workers.is_(None), JobRow.search_id.is_(None)
    )
    found = session.execute(waiting.where(JobRow.desired == Desired.RUN))
    rows = [row for row in map(_Queued._make, found) if _is_readable(row)]
    states = _dependency_states(session, rows)
    return ClusterView(nodes, tuple(_waiting_job(row, states) for row in rows), load_reservations(session), now)


def load_reservations(session: Session, excluding: str | None = None) -> tuple[Reservation, ...]:
    """What every job but `excluding` holds or was promised."""
    promised = (JobRow.state == JobState.QUEUED) & JobRow.start_workers.is_not(None)
    jobs = session.scalars(
        select(JobRow).where(
            # What trials hold is their search's.
            or_(JobRow.state.in_(_HOLDING), promised),
            JobRow.id != (excluding or ""),
            JobRow.search_id.is_(None),
        )
    )
    reservations = []
    searches = _held_by_searches(session)
    for job in filter(_is_readable, jobs):
        attempt = last_attempt(session, job)
        worker = needs(job.spec_json).worker
        if job.state == JobState.QUEUED:
            reservations.append(Reservation(job.id, job.start_workers or 0, worker))
        elif attempt is not None:
            held = searches.get(job.id, attempt.world_size)
            reservations.append(Reservation(job.id, held, worker, _nodes(attempt)))
    return tuple(reservations)


def _held_by_searches(session: Session) -> dict[str, int]:
    """Workers of the searches whose places the scheduler has changed: for as many trials as may run or, while it is
    more, as many as do."""
    changed = select(SearchRow.job_id, SearchRow.places, JobRow.spec_json).join(JobRow, JobRow.id == SearchRow.job_id)
    found = session.execute(changed.where(JobRow.state.in_(_HOLDING), SearchRow.places.is_not(None))).all()
    if not found:
        return {}
    trials = num_trials_under_way(session, [row.job_id for row in found])
    return {
        row.job_id: max(row.places or 0, trials.get(row.job_id, 0)) * needs(row.spec_json).per_trial for row in found
    }


def num_trials_under_way(session: Session, search_ids: Collection[str]) -> dict[str, int]:
    """Of each search how many trials have an attempt that has not ended."""
    live = (
        select(JobRow.search_id, func.count())
        .join(AttemptRow, AttemptRow.job_id == JobRow.id)
        .where(JobRow.search_id.in_(search_ids), AttemptRow.state != AttemptState.ENDED)
        .group_by(JobRow.search_id)
    )
    return {search_id: count for search_id, count in session.execute(live) if search_id is not None}


def last_attempt(session: Session, job: JobRow) -> AttemptRow | None:
    """The job's newest attempt, or None before the first."""
    attempts = select(AttemptRow).where(AttemptRow.job_id == job.id)
    return session.scalars(attempts.order_by(AttemptRow.number.desc()).limit(1)).first()


@lru_cache(maxsize=4096)
def needs(spec_json: bytes) -> Needs:
    """Workers, their sizes and the allowed world sizes of a resolved spec."""
    spec = json.loads(spec_json)
    resources = Resources.model_validate(spec.get("resources") or {})
    low, high = resources.worker_range
    batch = (spec.get("train") or {}).get("global_batch_size")
    sizes = tuple(n for n in range(low, high + 1) if batch is None or batch % n == 0)
    per_trial = 1
    if spec.get("kind") == "search":
        # Whole trials.
        per_trial = low // spec["concurrency"]["min"]
        sizes = tuple(range(low, high + 1, per_trial))
    worker = Worker(resources.cpus_per_worker, resources.gpus_per_worker, resources.accelerator)
    return Needs(worker, sizes, tuple((spec.get("queue") or {}).get("depends_on") or ()), per_trial)


def schedule_queue(db: Database, now: datetime) -> int:
    """One step of the scheduler: let jobs go, and write to the others why they wait. Returns how many were let go."""
    with db.reader() as session:
        waiting = select(JobRow.id, JobRow.reason, JobRow.message).where(
            JobRow.state == JobState.QUEUED, JobRow.search_id.is_(None)
        )
        said = {row.id: (row.reason, row.message) for row in session.execute(waiting)}
        searches = _running_searches(session)
        if not said and not searches:
            return 0
        view = load_view(session, now)
    started = 0
    for waiting_job in view.waiting:
        if failed := [(id_, state) for id_, state in waiting_job.depends_on if state in _WITHOUT_SUCCESS]:
            _give_up(db, waiting_job.job_id, failed, now)
    decisions = schedule(view)
    shares = share_places(view, decisions, searches)
    for search in searches:
        if shares.get(search.job_id, search.places) != search.places:
            _grant(db, search, shares[search.job_id], now)
    for decision in decisions:
        if isinstance(decision, Start):
            started += _let_go(db, decision, now)
        elif said.get(decision.job_id) != (decision.reason, decision.message):
            _explain(db, decision, now)
    return started


def _running_searches(session: Session) -> list[RunningSearch]:
    running = (
        select(JobRow.id, JobRow.spec_json, AttemptRow.number, AttemptRow.world_size, SearchRow.places, SearchRow.slots)
        .join(SearchRow, SearchRow.job_id == JobRow.id)
        .join(AttemptRow, and_(AttemptRow.job_id == JobRow.id, AttemptRow.number == JobRow.num_attempts))
        .where(JobRow.state == JobState.RUNNING, JobRow.desired == Desired.RUN)
        .where(AttemptRow.state != AttemptState.ENDED)
    )
    found = []
    for job in map(_Search._make, session.execute(running)):
        if not _is_readable(job):
            continue
        wanted = needs(job.spec_json)
        began_with = job.world_size // wanted.per_trial
        most = wanted.world_sizes[-1] // wanted.per_trial
        found.append(
            RunningSearch(
                job_id=job.id,
                attempt=job.attempt,
                worker=wanted.worker,
                per_trial=wanted.per_trial,
                began_with=began_with,
                places=began_with if job.places is None else job.places,
                most=most if job.slots is None else min(most, job.slots),
            )
        )
    return found


def _grant(db: Database, search: RunningSearch, places: int, now: datetime) -> None:
    with db.session() as session:
        job = lock_job(session, search.job_id)
        # Ended, stopped or begun anew since the view was read: the next step sees it as it is.
        if job is None or job.state != JobState.RUNNING or job.num_attempts != search.attempt:
            return
        session.get_one(SearchRow, search.job_id).places = places
        message = f"{places} trials may run side by side now, {search.places} before"
        record(session, search.job_id, "search.places", message, SCHEDULER, data={"places": places}, at=now)


def store_cluster(db: Database, status: ClusterStatus | None, message: str, now: datetime) -> None:
    """Remember what was last seen of the cluster; None: it did not answer, its nodes are kept as they were."""
    seen: dict[str, object] = {
        "id": CLUSTER_ROW_ID,
        "reachable": status is not None,
        "message": message,
        "seen_at": now,
    }
    changed = ["reachable", "message", "seen_at"]
    if status is not None:
        changed += ["cluster_id", "nodes"]
    nodes = [node.model_dump(mode="json") for node in status.nodes] if status else []
    seen |= {"cluster_id": status.cluster_id if status else "", "nodes": nodes}
    with db.session() as session:
        upsert(session, ClusterRow, [seen], ["id"], update=changed)


def beat(db: Database, now: datetime) -> None:
    """Note that a controller leads and is alive."""
    row = {"id": CLUSTER_ROW_ID, "cluster_id": "", "reachable": False, "nodes": [], "message": "", "seen_at": now}
    with db.session() as session:
        upsert(session, ClusterRow, [row | {"controller_at": now}], ["id"], update=["controller_at"])


def _is_readable(row: JobRow | _Queued | _Search) -> bool:
    """Whether the row's spec can be understood; one that cannot must not keep all others from being scheduled."""
    try:
        needs(row.spec_json)
    except (ValueError, TypeError, AttributeError) as error:
        log.error("A queued job's spec cannot be read.", job=row.id, error=str(error))
        return False
    return True


def _waiting_job(row: _Queued, states: dict[str, str]) -> WaitingJob:
    wanted = needs(row.spec_json)
    unmet = [(id_, states.get(id_, "unknown")) for id_ in wanted.depends_on]
    blocking = [(id_, state) for id_, state in unmet if state != JobState.SUCCEEDED]
    promised = _promised_by(row)
    if promised is not None and promised in states and not JobState(states[promised]).is_terminal:
        blocking.append((promised, states[promised]))
    return WaitingJob(
        job_id=row.id,
        priority=row.priority,
        created_at=row.created_at,
        world_sizes=wanted.world_sizes,
        worker=wanted.worker,
        depends_on=tuple(dict.fromkeys(blocking)),
        not_before=row.not_before,
    )


def _promised_by(row: _Queued) -> str | None:
    """The job whose best or latest checkpoint this one starts from, while that is not resolved to a checkpoint."""
    job_id, slash, _ = (row.init_from or "").partition("/")
    return job_id if slash else None


def _dependency_states(session: Session, rows: list[_Queued]) -> dict[str, str]:
    wanted = {id_ for row in rows for id_ in needs(row.spec_json).depends_on}
    wanted |= {id_ for row in rows if (id_ := _promised_by(row)) is not None}
    if not wanted:
        return {}
    return {row.id: row.state for row in session.execute(select(JobRow.id, JobRow.state).where(JobRow.id.in_(wanted)))}


def _nodes(attempt: AttemptRow) -> tuple[str, ...]:
    """Where each rank runs, as far as ranks have said."""
    if attempt.state == AttemptState.ENDED:
        return ()
    return tuple(str(heartbeat.get("node", "")) for heartbeat in attempt.ranks.values())


def _let_go(db: Database, start: Start, now: datetime) -> int:
    with db.session() as session:
        job = lock_job(session, start.job_id)
        # Cancelled, paused or already let go since the view was read: the next step sees it as it is.
        if job is None or job.state != JobState.QUEUED or job.desired != Desired.RUN or job.start_workers is not None:
            return 0
        job.start_workers = start.world_size
        job.reason = None
        job.message = ""
        job.next_look_at = None
        message = f"The scheduler let the job go with {start.world_size} workers"
        record(session, job.id, "job.scheduled", message, SCHEDULER, data={"world_size": start.world_size}, at=now)
    return 1


def _give_up(db: Database, job_id: str, failed: list[tuple[str, str]], now: datetime) -> None:
    """Ask for the end of a job that waits for what will never come; the reconciler ends it."""
    with db.session() as session:
        job = lock_job(session, job_id)
        if job is None or job.state != JobState.QUEUED or job.desired != Desired.RUN or job.start_workers is not None:
            return
        names = ", ".join(f"{id_} ({state})" for id_, state in failed)
        job.desired = Desired.STOP
        job.reason = ExitReason.DEPENDENCY_FAILED
        job.message = f"Depends on {names}."
        job.next_look_at = None
        job.version += 1
        data = {"jobs": [id_ for id_, _ in failed]}
        record(session, job.id, "job.dependency_failed", job.message, SCHEDULER, data=data, at=now)


def _explain(db: Database, wait: Wait, now: datetime) -> None:
    with db.session() as session:
        job = lock_job(session, wait.job_id)
        if job is None or job.state != JobState.QUEUED or job.start_workers is not None:
            return
        if job.desired != Desired.RUN:
            return
        if job.reason != wait.reason:
            data = {"reason": wait.reason, "position": wait.position}
            record(session, job.id, "job.waiting", wait.message, SCHEDULER, data=data, at=now)
        job.reason = wait.reason
        job.message = wait.message
