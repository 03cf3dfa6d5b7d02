"""A job's metric points in the order in which they arrived, for those who pass them on.

Reports of one attempt are stored one after the other, and none after its successor has begun: who has read up to
(attempt, seq) has missed nothing, however steps and names are mixed. Of a report all points are read together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from orchestrator.storage.tables import MetricRow

BEFORE_ALL = (0, -(2**62))
"""A place in the order that every point comes after."""
PAGE = 40_000
"""Twice as many points as a report may hold."""


@dataclass(frozen=True)
class Arrival:
    """A point and the report that brought it."""

    attempt: int
    seq: int
    name: str
    step: int
    value: float | None
    at: datetime

    @property
    def place(self) -> tuple[int, int]:
        return (self.attempt, self.seq)


def read_arrivals(
    session: Session, job_id: str, after: tuple[int, int], last_attempt: int, page: int = PAGE
) -> tuple[tuple[Arrival, ...], bool]:
    """The points that arrived after the place `after`, up to attempt `last_attempt`, whole reports of them; and whether
    there are more. Points of one report are ordered by name and step, so that the answer is the same each time."""
    attempt, seq = after
    later = or_(MetricRow.attempt > attempt, and_(MetricRow.attempt == attempt, MetricRow.seq > seq))
    rows = session.execute(
        select(MetricRow.attempt, MetricRow.seq, MetricRow.name, MetricRow.step, MetricRow.value, MetricRow.at)
        # The first bounds alone let the database go straight to the place in the index.
        .where(MetricRow.job_id == job_id, MetricRow.attempt >= attempt, MetricRow.attempt <= last_attempt, later)
        .order_by(MetricRow.attempt, MetricRow.seq, MetricRow.name, MetricRow.step)
        .limit(page + 1)
    )
    found = [Arrival(*row) for row in rows]
    if len(found) <= page:
        return tuple(found), False
    whole = [point for point in found if point.place != found[-1].place]
    assert whole, "a page holds more than one report"
    return tuple(whole), True


def last_valid_steps(from_steps: Mapping[int, int]) -> dict[int, int | None]:
    """For every attempt the last step of its points that count: the smallest step from which a later attempt started
    (`from_steps`: attempt -> that step). None: no later attempt, all count."""
    limits: dict[int, int | None] = {}
    limit: int | None = None
    for attempt in sorted(from_steps, reverse=True):
        limits[attempt] = limit
        limit = from_steps[attempt] if limit is None else min(limit, from_steps[attempt])
    return limits


def without_repeated(
    session: Session, job_id: str, points: Sequence[Arrival], from_steps: Mapping[int, int]
) -> tuple[Arrival, ...]:
    """`points` without those that an earlier attempt has measured at the same step, which still counts: an attempt may
    evaluate once more the step it continues from."""
    again = [point for point in points if point.step <= from_steps[point.attempt]]
    if not again:
        return tuple(points)
    rows = session.execute(
        select(MetricRow.name, MetricRow.step, MetricRow.attempt).where(
            MetricRow.job_id == job_id,
            MetricRow.name.in_({point.name for point in again}),
            MetricRow.step.in_({point.step for point in again}),
            MetricRow.attempt < max(point.attempt for point in again),
        )
    )
    known: dict[tuple[str, int], list[int]] = {}
    for name, step, attempt in rows:
        known.setdefault((name, step), []).append(attempt)

    def is_repeated(point: Arrival) -> bool:
        if point.step > from_steps[point.attempt]:
            return False
        # As things stood for this attempt: what later ones cut off does not change what it repeated.
        limits = last_valid_steps({a: step for a, step in from_steps.items() if a <= point.attempt})
        earlier = (limits[a] for a in known.get((point.name, point.step), ()) if a < point.attempt)
        return any(limit is None or point.step <= limit for limit in earlier)

    return tuple(point for point in points if not is_repeated(point))
