"""Metrics as users read them: one line per name, cut at every resume, joined down to a number of points a screen holds.

A restart repeats steps. Of attempt a only the points up to the step its successors resumed from are part of the job's
history; where two attempts have a point at the same step, the later attempt's counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from orchestrator.schemas import MetricSeries, MetricsPublic
from orchestrator.services.jobs import find_job
from orchestrator.storage.arrivals import last_valid_steps
from orchestrator.storage.db import Database
from orchestrator.storage.tables import AttemptRow, MetricRow

MAX_NAMES = 200


@dataclass(frozen=True)
class Point:
    step: int
    attempt: int
    value: float | None
    at: datetime | None = None
    """None where it was not read."""


def read_metrics(db: Database, job_id: str, names: Sequence[str], max_points: int) -> MetricsPublic:
    """The job's metrics `names` (none given: all), each as at most `max_points` points. Raises NotFound."""
    with db.reader() as session:
        find_job(session, job_id)
        all_names = metric_names(session, job_id)
        wanted = [name for name in all_names if not names or name in names][:MAX_NAMES]
        counted = in_lineage(last_valid_steps_of(session, job_id))
        series = tuple(_read_series(session, job_id, name, counted, max_points) for name in wanted)
    return MetricsPublic(job_id=job_id, names=all_names, series=series)


def metric_names(session: Session, job_id: str) -> tuple[str, ...]:
    """Every metric the job has reported, sorted."""
    # From each name to the next one in the index: DISTINCT would read every point.
    names: list[str] = []
    while True:
        beyond = (MetricRow.name > names[-1],) if names else ()
        name = session.scalar(select(func.min(MetricRow.name)).where(MetricRow.job_id == job_id, *beyond))
        if name is None:
            return tuple(names)
        names.append(name)


def downsample(points: Iterable[Point], name: str, first: int, last: int, max_points: int) -> MetricSeries:
    """Points (in order of step, all in [first, last]) joined into at most `max_points` equal ranges of steps.

    Each range keeps its mean, its extremes and its last step and attempt. A range whose values are all non-finite
    stays null, so that a diverged run shows a gap.
    """
    width = max(1, -(-(last - first + 1) // max_points))
    columns = _Columns()
    bucket = _Bucket()
    current = 0
    for point in points:
        index = (point.step - first) // width
        if bucket.num_points and index != current:
            columns.add(bucket)
            bucket = _Bucket()
        current = index
        bucket.add(point)
    if bucket.num_points:
        columns.add(bucket)
    return columns.series(name)


@dataclass
class _Bucket:
    num_points: int = 0
    step: int = 0
    attempt: int = 0
    values: list[float] = field(default_factory=list)

    def add(self, point: Point) -> None:
        self.num_points += 1
        self.step, self.attempt = point.step, point.attempt
        if point.value is not None:
            self.values.append(point.value)


@dataclass
class _Columns:
    steps: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    lows: list[float | None] = field(default_factory=list)
    highs: list[float | None] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    num_points: int = 0

    def add(self, bucket: _Bucket) -> None:
        finite = bucket.values
        self.steps.append(bucket.step)
        # Divided before it is summed: the sum of large finite values may not be finite.
        mean = sum(value / len(finite) for value in finite) if len(finite) > 1 else (finite[0] if finite else None)
        self.values.append(mean)
        self.lows.append(min(finite, default=None))
        self.highs.append(max(finite, default=None))
        self.attempts.append(bucket.attempt)
        self.num_points += bucket.num_points

    def series(self, name: str) -> MetricSeries:
        return MetricSeries(
            name=name,
            steps=tuple(self.steps),
            values=tuple(self.values),
            lows=tuple(self.lows),
            highs=tuple(self.highs),
            attempts=tuple(self.attempts),
            num_points=self.num_points,
        )


def last_valid_steps_of(session: Session, job_id: str) -> dict[int, int | None]:
    """`last_valid_steps` of the job's attempts as they are now."""
    rows = session.execute(select(AttemptRow.number, AttemptRow.from_step).where(AttemptRow.job_id == job_id))
    return last_valid_steps({row.number: row.from_step for row in rows})


def in_lineage(limits: Mapping[int, int | None]) -> ColumnElement[bool]:
    """The points that count, as a condition: one clause per attempt that was cut, one for all others."""
    cut = {attempt: limit for attempt, limit in limits.items() if limit is not None}
    clauses = [and_(MetricRow.attempt == attempt, MetricRow.step <= limit) for attempt, limit in cut.items()]
    return or_(MetricRow.attempt.not_in(list(cut)), *clauses)


def _read_series(
    session: Session, job_id: str, name: str, counted: ColumnElement[bool], max_points: int
) -> MetricSeries:
    where = (MetricRow.job_id == job_id, MetricRow.name == name, counted)
    ends = session.execute(select(func.min(MetricRow.step), func.max(MetricRow.step)).where(*where)).one()
    first: int | None = ends[0]
    last: int | None = ends[1]
    if first is None or last is None:
        return downsample((), name, 0, 0, max_points)
    query = select(MetricRow.step, MetricRow.attempt, MetricRow.value).where(*where)
    rows = session.execute(query.order_by(MetricRow.step, MetricRow.attempt).execution_options(yield_per=2000))
    points = (Point(step, attempt, value) for step, attempt, value in rows)
    return downsample(latest_attempts(points), name, first, last, max_points)


def latest_attempts(points: Iterable[Point]) -> Iterator[Point]:
    """Of points with the same step only the last: the highest attempt's."""
    held: Point | None = None
    for point in points:
        if held is not None and held.step != point.step:
            yield held
        held = point
    if held is not None:
        yield held
