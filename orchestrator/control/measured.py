"""What an attempt measured and its driver did not deliver.

Ranks put what they measured into their checkpoints beside reporting it (configs.wire.RankFiles). Where the last report
of a driver is missing (it was killed, or the API was away to the end), the points up to the last checkpoint are taken
from there: steps that are never done again keep their measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import structlog
from pydantic import ValidationError
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from configs.layout import rank_files_key
from configs.wire import MAX_POINTS, MetricColumns, RankFiles
from orchestrator.storage.db import Database
from orchestrator.storage.points import finite, upsert_points
from orchestrator.storage.store import NotFound, ObjectStore
from orchestrator.storage.tables import AttemptRow, CheckpointRow, JobRow, MetricRow

log = structlog.get_logger(__name__)


def recover_measured(db: Database, store: ObjectStore, attempt_id: str, guard: Callable[[Session], object]) -> int:
    """Store the points that lie in the attempt's checkpoints and are not in the database, unless its driver delivered
    everything. Returns how many points were looked at.

    `guard` runs first in the transaction that writes, and raises if the caller may not act for the job any more.

    Raises:
        StoreError: the object store could not be read; nothing was changed.
    """
    with db.reader() as session:
        attempt = session.get_one(AttemptRow, attempt_id)
        if attempt.reported:
            return 0
        of_attempt = (CheckpointRow.job_id == attempt.job_id, CheckpointRow.attempt == attempt.number)
        prefixes = session.scalars(
            select(CheckpointRow.prefix)
            .where(*of_attempt, CheckpointRow.deleted_at.is_(None))
            .order_by(CheckpointRow.step)
        ).all()
    columns = [c for prefix in prefixes for c in _measured(store, prefix, attempt.world_size)]
    if not columns:
        return 0
    with db.session() as session:
        guard(session)
        attempt = session.get_one(AttemptRow, attempt_id)
        _note_newest(session, session.get_one(JobRow, attempt.job_id), columns)
        for batch in _batches(columns):
            # In a report's place: who passes points on in the order of arrival finds these too.
            attempt.report_seq += 1
            upsert_points(session, attempt.job_id, attempt.number, attempt.report_seq, batch, keep=True)
        attempt.reported = True
    return sum(map(len, columns))


def _measured(store: ObjectStore, prefix: str, world_size: int) -> Iterator[MetricColumns]:
    for rank in range(world_size):
        key = rank_files_key(prefix, rank, world_size)
        try:
            yield from RankFiles.model_validate_json(store.get(key)).measured
        except (NotFound, ValidationError) as error:
            # A checkpoint in a deletion that was interrupted, or a damaged one: the others still count.
            log.warning("Measurements of a checkpoint could not be read.", key=key, error=str(error))


def _note_newest(session: Session, job: JobRow, columns: list[MetricColumns]) -> None:
    """The job's last values, where these are later than what was delivered."""
    names = {column.name for column in columns}
    known = select(MetricRow.name, func.max(MetricRow.step).label("newest")).where(
        MetricRow.job_id == job.id, MetricRow.name.in_(names)
    )
    newest: dict[str, int] = {row.name: row.newest for row in session.execute(known.group_by(MetricRow.name))}
    values = dict(job.last_metrics)
    for column in columns:
        for step, value in zip(column.steps, column.values, strict=True):
            if step > newest.get(column.name, -1):
                newest[column.name], values[column.name] = step, finite(value)
    job.last_metrics = values


def _batches(columns: list[MetricColumns]) -> Iterator[list[MetricColumns]]:
    """As many points at once as a report may hold."""
    batch: list[MetricColumns] = []
    for column in columns:
        for start in range(0, len(column), MAX_POINTS):
            part = column.part(start, start + MAX_POINTS)
            if batch and sum(map(len, batch)) + len(part) > MAX_POINTS:
                yield batch
                batch = []
            batch.append(part)
    yield batch
