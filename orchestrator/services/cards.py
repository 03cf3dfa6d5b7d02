"""The card of a run: everything a reader needs to judge it and to do it again, on one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from configs.states import JobState
from configs.wire import DatasetCard, EvaluationReport, Manifest
from orchestrator.schemas import CheckpointPublic, JobCard, JobPublic, MetricSeries, Work
from orchestrator.services.checkpoints import get_manifest, get_report, list_checkpoints
from orchestrator.services.jobs import find_job, publish
from orchestrator.services.metrics import metric_names, read_metrics
from orchestrator.services.problems import ApiError, NotFound
from orchestrator.storage.db import Database
from orchestrator.storage.store import ObjectStore
from orchestrator.storage.tables import CheckpointRow, JobRow

log = structlog.get_logger(__name__)
MAX_POINTS = 60
MAX_EVALUATIONS = 20
_PINNED = ("torch", "torchvision", "deepspeed", "ray", "numpy")


def make_card(db: Database, store: ObjectStore, job_id: str) -> JobCard:
    """The job's card, as of now.

    Raises:
        NotFound: there is no such job.
        StoreError: the object store does not answer.
    """
    with db.reader() as session:
        row = find_job(session, job_id)
        (job,) = publish(session, [row])
        data = DatasetCard.model_validate(row.dataset) if row.dataset is not None else None
        names = [name for name in metric_names(session, job_id) if "/rank-" not in name]
        evaluate_jobs = [job_id] if job.kind == "evaluate" else _evaluate_jobs(session, job_id)
    checkpoints = list_checkpoints(db, job_id).items
    manifest = _newest_manifest(db, store, checkpoints)
    versions = manifest.versions if manifest is not None else {}
    return JobCard(
        made_at=datetime.now(UTC),
        job=job,
        data=data,
        trained_data_fingerprint=manifest.data_fingerprint if manifest is not None else None,
        versions=versions,
        manifest_of=manifest.checkpoint_id if manifest is not None else None,
        seeds=dict(find_seeds(job.spec)),
        work=work_of(job),
        curves=_curves(db, job_id, names),
        evaluations=tuple(_reports(db, store, evaluate_jobs)),
        checkpoints=checkpoints,
        reproduce=tuple(how_to_reproduce(job, data, versions)),
    )


def find_seeds(spec: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Every field named seed, with its dotted key."""
    for key, value in spec.items():
        if isinstance(value, Mapping):
            yield from find_seeds(value, f"{prefix}{key}.")
        elif key == "seed" and isinstance(value, int):
            yield f"{prefix}{key}", value


def work_of(job: JobPublic) -> Work:
    """Operations planned, done and done again, from the plan that `configs.cost` made at submission."""
    planned, steps = job.plan.get("exaflops"), job.plan.get("steps")
    if planned is None:
        return Work(planned=None, done=None, repeated=None)
    if not steps:
        done = planned if job.state == JobState.SUCCEEDED else None
        return Work(planned=planned, done=done, repeated=None)
    per_step = planned / steps
    return Work(planned=planned, done=job.progress.step * per_step, repeated=job.usage.wasted_steps * per_step)


def how_to_reproduce(job: JobPublic, data: DatasetCard | None, versions: Mapping[str, str]) -> Iterator[str]:
    """What to do to get the run again, in order."""
    ours = versions.get("patchwork-vit")
    if ours is None:
        yield "No checkpoint was left, so the versions it ran with are not recorded: use those of its time."
    else:
        pins = [f"{name}=={versions[name]}" for name in _PINNED if name in versions]
        yield f"Install Python {versions.get('python', '')}, patchwork-vit=={ours}, {', '.join(pins)}."
    if data is not None:
        yield f"Have the data set {data.name} with the fingerprint {data.fingerprint}."
    if job.init_from is not None:
        yield f"Have the checkpoint it starts from: {job.init_from}."
    if job.resume_from is not None:
        yield f"It goes on from another job's checkpoint, {job.resume_from}: reproduce that job first."
    yield "Save the job description (spec) as job.yaml."
    yield f"Check it: `patchwork submit job.yaml --dry-run --json` says spec_hash {job.spec_hash}."
    worlds = sorted({attempt.world_size for attempt in job.attempts})
    if worlds:
        yield f"Submit it: `patchwork submit job.yaml`. It ran on {' and '.join(map(str, worlds))} workers."


def _evaluate_jobs(session: Session, job_id: str) -> list[str]:
    """Evaluate jobs of this job's checkpoints that succeeded, the newest first."""
    own = select(CheckpointRow.id).where(CheckpointRow.job_id == job_id)
    query = (
        select(JobRow.id)
        .where(JobRow.kind == "evaluate", JobRow.state == JobState.SUCCEEDED, JobRow.init_from.in_(own))
        .order_by(JobRow.created_at.desc())
        .limit(MAX_EVALUATIONS)
    )
    return list(session.scalars(query))


def _reports(db: Database, store: ObjectStore, job_ids: Sequence[str]) -> Iterator[EvaluationReport]:
    for job_id in job_ids:
        try:
            yield get_report(db, store, job_id)
        except NotFound:
            continue


def _newest_manifest(db: Database, store: ObjectStore, checkpoints: Sequence[CheckpointPublic]) -> Manifest | None:
    """The manifest of the newest checkpoint that has one to read."""
    for checkpoint in checkpoints:
        if not checkpoint.available:
            continue
        try:
            return get_manifest(db, store, checkpoint.id)
        except ApiError as error:
            # Deleted a moment ago, or unreadable: an older one says the same of versions.
            log.warning("card_manifest_unreadable", checkpoint=checkpoint.id, error=error.detail)
    return None


def _curves(db: Database, job_id: str, names: Sequence[str]) -> tuple[MetricSeries, ...]:
    # No names means all of them to `read_metrics`.
    return read_metrics(db, job_id, names, MAX_POINTS).series if names else ()
