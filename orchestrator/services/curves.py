"""Curves joined by the database: a million points become a few hundred without leaving it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from configs.states import JobState
from orchestrator.services.jobs import find_job
from orchestrator.services.metrics import MAX_NAMES, in_lineage, last_valid_steps_of, metric_names
from orchestrator.storage.db import Database
from orchestrator.storage.tables import AttemptRow, MetricRow

_SCALE = 2.0**64
"""Values are divided by it while they are summed: the sum of large finite values may not be finite."""


@dataclass(frozen=True)
class Curve:
    """One metric as columns, each entry a range of steps: its last step and attempt, mean, extremes, when it ended."""

    steps: tuple[int, ...] = ()
    values: tuple[float | None, ...] = ()
    lows: tuple[float | None, ...] = ()
    highs: tuple[float | None, ...] = ()
    attempts: tuple[int, ...] = ()
    ats: tuple[datetime, ...] = ()
    num_points: int = 0


def read_curve(
    session: Session, job_id: str, name: str, counted: ColumnElement[bool], max_points: int, *, was_resumed: bool
) -> Curve:
    """The points that count, joined into at most `max_points` equal ranges of steps. With `was_resumed` several
    attempts may have measured one step: the latest one's point counts."""
    points = _points(job_id, name, counted, was_resumed).subquery()
    first, last = session.execute(select(func.min(points.c.step), func.max(points.c.step))).one()
    if first is None:
        return Curve()
    width = max(1, -(-(last - first + 1) // max_points))
    bucket = (points.c.step - first) // width
    rows = session.execute(
        select(
            func.max(points.c.step),
            # Not avg(): PostgreSQL's squares what it is given, too.
            func.sum(points.c.value / _SCALE),
            func.min(points.c.value),
            func.max(points.c.value),
            func.max(points.c.attempt),
            func.max(points.c.at),
            func.count(),
            func.count(points.c.value),
        )
        .group_by(bucket)
        .order_by(bucket)
    ).all()
    return Curve(
        steps=tuple(row[0] for row in rows),
        # Of one value, or equal ones, itself: to scale it may round the smallest ones.
        values=tuple(row[2] if row[1] is None or row[2] == row[3] else row[1] / row[7] * _SCALE for row in rows),
        lows=tuple(row[2] for row in rows),
        highs=tuple(row[3] for row in rows),
        attempts=tuple(row[4] for row in rows),
        ats=tuple(row[5] for row in rows),
        num_points=sum(row[6] for row in rows),
    )


def last_value(
    session: Session, job_id: str, name: str, counted: ColumnElement[bool]
) -> tuple[int, float | None] | None:
    """Step and value of the newest point that counts; None: there is none."""
    query = select(MetricRow.step, MetricRow.value).where(MetricRow.job_id == job_id, MetricRow.name == name, counted)
    row = session.execute(query.order_by(MetricRow.step.desc(), MetricRow.attempt.desc()).limit(1)).first()
    return None if row is None else (row[0], row[1])


def _points(
    job_id: str, name: str, counted: ColumnElement[bool], was_resumed: bool
) -> Select[int, int, float | None, datetime]:
    columns = (MetricRow.step, MetricRow.attempt, MetricRow.value, MetricRow.at)
    where = (MetricRow.job_id == job_id, MetricRow.name == name, counted)
    if not was_resumed:
        return select(*columns).where(*where)
    place = func.row_number().over(partition_by=MetricRow.step, order_by=MetricRow.attempt.desc()).label("place")
    ranked = select(*columns, place).where(*where).subquery()
    return select(ranked.c.step, ranked.c.attempt, ranked.c.value, ranked.c.at).where(ranked.c.place == 1)


@dataclass(frozen=True)
class Curves:
    """Every curve of a job. `version` changes with every report that arrives."""

    version: tuple[int, ...]
    curves: dict[str, Curve]
    is_final: bool
    """The job has ended: nothing will be added."""


def read_curves(db: Database, job_id: str, max_points: int, known: Curves | None = None) -> Curves:
    """The job's curves, each at most `max_points` points; `known`, if no report has arrived since it was read.

    Raises:
        NotFound: there is no such job.
    """
    with db.reader() as session:
        is_final = JobState(find_job(session, job_id).state).is_terminal
        seen = session.execute(
            select(AttemptRow.number, AttemptRow.report_seq)
            .where(AttemptRow.job_id == job_id)
            .order_by(AttemptRow.number)
        )
        version = tuple(number for row in seen for number in row)
        if known is not None and known.version == version:
            return known if known.is_final == is_final else replace(known, is_final=is_final)
        limits = last_valid_steps_of(session, job_id)
        counted = in_lineage(limits)
        curves = {
            name: read_curve(session, job_id, name, counted, max_points, was_resumed=len(limits) > 1)
            for name in metric_names(session, job_id)[:MAX_NAMES]
        }
    return Curves(version, {name: curve for name, curve in curves.items() if curve.steps}, is_final)
