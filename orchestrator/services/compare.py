"""Several jobs side by side: their curves over one another, and where their descriptions differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from configs.errors import to_pointer
from orchestrator.services.curves import last_value, read_curve
from orchestrator.services.jobs import find_job
from orchestrator.services.metrics import in_lineage, last_valid_steps_of, metric_names
from orchestrator.services.problems import Invalid, field_error
from orchestrator.storage.db import Database
from orchestrator.storage.tables import JobRow
from orchestrator.view_schemas import ComparedJob, ComparedSeries, ComparisonPublic, SpecDifference

MAX_JOBS = 20
MAX_NAMES = 12
_MISSING = object()


def compare_jobs(db: Database, job_ids: Sequence[str], names: Sequence[str], max_points: int) -> ComparisonPublic:
    """The jobs in the order given; of their metrics those in `names` (none given: none), each at most `max_points`
    points.

    Raises:
        Invalid: too many jobs or names, or a job is named twice.
        NotFound: there is no such job.
    """
    _check("/job", job_ids, MAX_JOBS)
    _check("/name", names, MAX_NAMES)
    with db.reader() as session:
        rows = [find_job(session, job_id) for job_id in job_ids]
        specs = [json.loads(row.spec_json) for row in rows]
        all_names = [metric_names(session, row.id) for row in rows]
        series = [
            _series(session, index, row, name, max_points)
            for index, row in enumerate(rows)
            for name in names
            if name in all_names[index]
        ]
    return ComparisonPublic(
        jobs=tuple(_job(index, row, specs[index]) for index, row in enumerate(rows)),
        names=tuple(sorted({name for found in all_names for name in found})),
        series=tuple(series),
        differences=tuple(differences(specs)),
    )


def differences(specs: Sequence[Mapping[str, Any]]) -> Iterator[SpecDifference]:
    """Every field in which the descriptions differ, in the order of their keys."""
    flat = [dict(_leaves(spec)) for spec in specs]
    for path in dict.fromkeys(path for fields in flat for path in fields):
        values = [fields.get(path, _MISSING) for fields in flat]
        if any(value != values[0] for value in values):
            shown = tuple(None if value is _MISSING else value for value in values)
            yield SpecDifference(pointer=to_pointer(path), values=shown)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Fields that hold no further ones; a list is one value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    else:
        yield path, value


def _series(session: Session, index: int, row: JobRow, name: str, max_points: int) -> ComparedSeries:
    limits = last_valid_steps_of(session, row.id)
    counted = in_lineage(limits)
    curve = read_curve(session, row.id, name, counted, max_points, was_resumed=len(limits) > 1)
    last = last_value(session, row.id, name, counted)
    begun = row.started_at or row.created_at
    return ComparedSeries(
        index=index,
        name=name,
        steps=curve.steps,
        seconds=tuple(max(0.0, round((at - begun).total_seconds(), 1)) for at in curve.ats),
        values=curve.values,
        lows=curve.lows,
        highs=curve.highs,
        last=last[1] if last is not None else None,
        lowest=min((low for low in curve.lows if low is not None), default=None),
        highest=max((high for high in curve.highs if high is not None), default=None),
    )


def _job(index: int, row: JobRow, spec: Mapping[str, Any]) -> ComparedJob:
    batch = (spec.get("train") or {}).get("global_batch_size")
    return ComparedJob(
        index=index,
        id=row.id,
        name=row.name,
        kind=row.kind,
        state=row.state,
        started_at=row.started_at,
        global_batch_size=batch,
    )


def _check(pointer: str, given: Sequence[str], at_most: int) -> None:
    value: object
    twice = next((value for value in given if given.count(value) > 1), None)
    if len(given) > at_most:
        message, value, allowed = f"{len(given)} were given", list(given)[:3], f"at most {at_most}"
    elif twice is not None:
        message, value, allowed = "is given twice", twice, "each once"
    else:
        return
    raise Invalid(f"{pointer[1:]}: {message}.", errors=[field_error(pointer, message, value, allowed)])
