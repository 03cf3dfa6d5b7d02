"""What is true of a job now: read from the database, the cluster and the object store. Decides nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from configs.reasons import ExitReason
from configs.service import Retry
from configs.states import AttemptState, JobState
from orchestrator.control.attempts import read_exit
from orchestrator.control.decide import Observation
from orchestrator.control.launcher import ClusterStatus, JobStatus, Launcher, LauncherError, LaunchState
from orchestrator.control.leases import Claim, guarded, renew
from orchestrator.control.queue_view import load_reservations, needs
from orchestrator.control.retries import Ended, Policy
from orchestrator.control.scheduling import fitting_world_size
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.registry import apply_retention, newest_checkpoint, register_manifests
from orchestrator.storage.store import ObjectStore
from orchestrator.storage.tables import AttemptRow, CheckpointRow, JobRow

log = structlog.get_logger(__name__)
REGISTER_EVERY_S = 3.0
"""How often the manifests of a running job are looked for."""
CLUSTER_MAX_AGE_S = 1.0


@dataclass(frozen=True)
class Facts:
    """What the database says of a claimed job. The rows are detached: nothing is written through them."""

    job: JobRow
    attempt: AttemptRow | None
    """The last one."""
    previous: Ended | None
    """How the one before it ended."""
    ran_s: float
    """Running time of all attempts that have ended."""
    policy: Policy
    num_rollbacks: int = 0
    """How many attempts before the last ended in a rollback."""

    @property
    def live_attempt(self) -> AttemptRow | None:
        """The attempt that has not been proved gone."""
        return self.attempt if self.attempt is not None and self.attempt.state != AttemptState.ENDED else None


def load_facts(db: Database, job_id: str) -> Facts:
    """A short look into the database."""
    with db.reader() as session:
        job = session.get_one(JobRow, job_id)
        by_number = select(AttemptRow).where(AttemptRow.job_id == job.id).order_by(AttemptRow.number.desc())
        attempts = list(session.scalars(by_number))
        previous = _ended(session, attempts[1]) if len(attempts) > 1 else None
    ended = [a for a in attempts if a.state == AttemptState.ENDED and a.ended_at is not None]
    ran_s = sum((a.ended_at - a.created_at).total_seconds() for a in ended if a.ended_at is not None)
    num_rollbacks = sum(a.exit_reason == ExitReason.LOSS_SPIKE for a in attempts[1:])
    return Facts(job, attempts[0] if attempts else None, previous, ran_s, policy_of(job), num_rollbacks)


class Observer:
    """Looks at jobs for the reconciler. Used by several threads; they share what was last seen of the cluster."""

    def __init__(
        self,
        db: Database,
        launcher: Launcher,
        store: ObjectStore,
        settings: Settings,
        clock: Callable[[], datetime],
    ) -> None:
        self._db, self._launcher, self._store, self._settings, self._clock = db, launcher, store, settings, clock
        self._watching_since = clock()
        self._registered_at: dict[str, datetime] = {}
        self._cluster_lock = threading.Lock()
        self._cluster: tuple[datetime, ClusterStatus] | None = None

    def look(self, claim: Claim, facts: Facts) -> Observation:
        """What can be seen of the claimed job now; registers the checkpoints found on the way.

        Raises:
            StoreError: the object store failed.
            LeaseLost: another process took over.
        """
        seen = Observation(
            self._watching_since, previous=facts.previous, ran_s=facts.ran_s, num_rollbacks=facts.num_rollbacks
        )
        job, attempt = facts.job, facts.live_attempt
        needs_cluster = attempt is not None or job.state == JobState.RECOVERING
        cluster = self._see_cluster() if needs_cluster or job.start_workers is not None else None
        if cluster is None:
            return seen
        seen = replace(seen, cluster_id=cluster.cluster_id)
        if attempt is not None:
            return self._observe_attempt(claim, attempt, seen)
        if job.state == JobState.RECOVERING:
            return replace(seen, fitting_world_size=self._fitting(facts, cluster))
        return seen

    def _observe_attempt(self, claim: Claim, attempt: AttemptRow, seen: Observation) -> Observation:
        """The attempt's own word first: after it, what the cluster says is only a question of being gone."""
        said = read_exit(self._store, attempt.id)
        status = self._status(attempt.id) if seen.cluster_id == attempt.cluster_id else None
        is_gone = seen.cluster_id != attempt.cluster_id or _is_gone(status)
        leftovers = self._leftovers(attempt.id) if _is_gone(status) else None
        if is_gone and said is None:
            said = read_exit(self._store, attempt.id)  # it may have been written between the two looks
        if is_gone or said is not None or self._is_time_to_register(claim.job_id):
            self._register(claim)
        with self._db.reader() as session:
            newest = newest_checkpoint(session, claim.job_id)
            has_progressed = made_progress(session, attempt)
        return replace(
            seen,
            exit=said,
            status=status,
            leftovers=leftovers,
            newest_step=newest.step if newest is not None else None,
            made_progress=has_progressed,
        )

    def _see_cluster(self) -> ClusterStatus | None:
        """The cluster as it was within the last second; None if it does not answer."""
        with self._cluster_lock:
            if self._cluster is not None and not self._is_older(self._cluster[0], CLUSTER_MAX_AGE_S):
                return self._cluster[1]
            try:
                status = self._launcher.cluster()
            except LauncherError as error:
                log.warning("The cluster does not answer.", error=type(error).__name__, detail=str(error))
                self._cluster = None
                return None
            self._cluster = (self._clock(), status)
            return status

    def _status(self, attempt: str) -> JobStatus | None:
        try:
            return self._launcher.status(attempt)
        except LauncherError as error:
            log.warning("The cluster does not say how an attempt is.", attempt=attempt, detail=str(error))
            return None

    def _leftovers(self, attempt: str) -> tuple[str, ...] | None:
        try:
            return tuple(self._launcher.leftovers(attempt))
        except LauncherError as error:
            log.warning("The cluster does not say what is left of an attempt.", attempt=attempt, detail=str(error))
            return None

    def _fitting(self, facts: Facts, cluster: ClusterStatus) -> int | None:
        """With how many workers the job could start now: as many as it had, else the most that fit."""
        wanted = needs(facts.job.spec_json)
        sizes = sorted(wanted.world_sizes, reverse=True)
        if facts.attempt is not None and facts.attempt.world_size in sizes:
            sizes = [facts.attempt.world_size, *sizes]
        with self._db.reader() as session:
            others = load_reservations(session, excluding=facts.job.id)
        return fitting_world_size(cluster.nodes, others, wanted.worker, sizes)

    def forget(self, job_id: str) -> None:
        """Look for new manifests of this job at the next look, whenever that is."""
        self._registered_at.pop(job_id, None)

    def _is_time_to_register(self, job_id: str) -> bool:
        registered_at = self._registered_at.get(job_id)
        return registered_at is None or self._is_older(registered_at, REGISTER_EVERY_S)

    def _is_older(self, then: datetime, seconds: float) -> bool:
        # A clock that was set back must not keep an old view for as long as it was set back.
        return not 0.0 <= (self._clock() - then).total_seconds() < seconds

    def _register(self, claim: Claim) -> None:
        for job_id in (claim.job_id, *self._running_trials(claim.job_id)):
            new = register_manifests(self._db, self._store, job_id, guard=lambda session: guarded(session, claim))
            if new:
                renew(self._db, claim, self._clock(), self._settings.lease_s)
                apply_retention(self._db, self._store, job_id, self._clock())
        self._registered_at[claim.job_id] = self._clock()

    def _running_trials(self, search_id: str) -> list[str]:
        """The trials that leave checkpoints now: nobody else looks for these while they run."""
        with self._db.reader() as session:
            mine = JobRow.search_id == search_id, JobRow.state.in_((JobState.RUNNING, JobState.RECOVERING))
            return list(session.scalars(select(JobRow.id).where(*mine)))


def _is_gone(status: JobStatus | None) -> bool:
    """Whether the cluster says that the driver does not run (any more)."""
    return status is not None and (status.state.is_terminal or status.state is LaunchState.MISSING)


def made_progress(session: Session, attempt: AttemptRow) -> bool:
    """Whether the attempt committed a checkpoint (one that retention has deleted since counts too), or, of a search,
    a trial ended in it."""
    if attempt.ended_trials:
        return True
    mine = CheckpointRow.job_id == attempt.job_id, CheckpointRow.attempt == attempt.number
    return session.scalar(select(CheckpointRow.id).where(*mine, CheckpointRow.valid.is_(True)).limit(1)) is not None


def _ended(session: Session, attempt: AttemptRow) -> Ended | None:
    if attempt.exit_reason is None:
        return None
    failure = (attempt.exit or {}).get("first_failure") or {}
    return Ended(
        ExitReason(attempt.exit_reason),
        error_type=str(failure.get("error_type", "")),
        made_progress=made_progress(session, attempt),
        made_a_step=attempt.to_step > attempt.from_step,
        last_step=attempt.to_step,
    )


def policy_of(job: JobRow) -> Policy:
    """What the job's description says of retries and time."""
    spec = json.loads(job.spec_json)
    retry = Retry.model_validate(spec.get("retry") or {})
    return Policy(
        is_training=job.kind in ("pretrain", "finetune"),
        max_user_failures=retry.max_user_failures,
        max_infra_failures=retry.max_infra_failures,
        deadline_s=(spec.get("queue") or {}).get("deadline_s"),
        max_rollbacks=((spec.get("train") or {}).get("spike_rollback") or {}).get("max_rollbacks", 0),
        num_reporters=1 if job.kind == "search" else None,
    )
