"""Rows as the public models of `schemas`. Reads only what it is given: no queries here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic_core import from_json, to_json

from configs.imports import WeightOrigin
from configs.model import network_adapter
from configs.reasons import EXIT_REASONS
from configs.states import JobState
from configs.wire import Preprocess, RankFailure
from orchestrator.control.transitions import allowed_actions
from orchestrator.schemas import (
    AttemptPublic,
    CheckpointPublic,
    EventPublic,
    JobPublic,
    Progress,
    QueuePublic,
    RankPublic,
    Usage,
)
from orchestrator.storage.tables import AttemptRow, CheckpointRow, EventRow, JobRow


@dataclass(frozen=True, slots=True)
class StoredJson:
    """Columns of JSON as they are stored, in UTF-8."""

    labels: bytes
    submitted: bytes
    plan: bytes
    last_metrics: bytes


_NAMES_A_PRESET = re.compile(rb'"preset": ?"')
_ADVICE = {reason.value: row.advice for reason, row in EXIT_REASONS.items()}


def job_public(row: JobRow, attempts: Sequence[AttemptRow], queue: QueuePublic | None) -> JobPublic:
    """A job with its attempts (by number) and, if it waits, its place in the queue."""
    return JobPublic(
        **_values(row, attempts, queue),
        labels=row.labels,
        spec=from_json(row.spec_json),
        submitted=row.submitted,
        plan=row.plan,
        last_metrics=row.last_metrics,
    )


def job_json(row: JobRow, stored: StoredJson, attempts: Sequence[AttemptRow], queue: QueuePublic | None) -> bytes:
    """What `job_public` says, as JSON. What lies in the database as JSON is copied as it is: it was checked when it was
    stored, and reading, checking and writing it again takes most of the time of a list."""
    rest = to_json(_values(row, attempts, queue), inf_nan_mode="null")
    return b'%b,"labels":%b,"spec":%b,"submitted":%b,"plan":%b,"last_metrics":%b}' % (
        rest[:-1],
        stored.labels,
        row.spec_json,
        stored.submitted,
        stored.plan,
        stored.last_metrics,
    )


def _values(row: JobRow, attempts: Sequence[AttemptRow], queue: QueuePublic | None) -> dict[str, Any]:
    """The fields of `JobPublic`, but for those that are stored as JSON."""
    return {
        "id": row.id,
        "kind": row.kind,
        "name": row.name,
        "project": row.project,
        "priority": row.priority,
        "state": row.state,
        "desired": row.desired,
        "reason": row.reason,
        "message": row.message,
        "advice": _advice(row.reason) if row.ended_at is not None else None,
        "state_since": row.state_since,
        "allowed_actions": tuple(allowed_actions(row)),
        "progress": _progress(row, attempts),
        "queue": queue,
        "spec_hash": row.spec_hash,
        "training_fingerprint": row.training_fingerprint,
        "preset": _preset(row.spec_json),
        "num_attempts": row.num_attempts,
        "attempts": tuple(attempt_public(attempt) for attempt in attempts),
        "usage": Usage(
            gpu_seconds=row.gpu_seconds,
            wasted_gpu_s=row.wasted_gpu_s,
            wasted_steps=row.wasted_steps,
            overhead_s=row.overhead_s,
        ),
        "init_from": row.init_from,
        "retry_of": row.retry_of,
        "resume_from": row.resume_from,
        "created_by": row.created_by,
        "created_at": row.created_at,
        "started_at": row.started_at,
        "ended_at": row.ended_at,
        "etag": etag(row),
    }


def _preset(spec_json: bytes) -> str | None:
    """The preset that a stored spec names. Most name none: those are not read, only searched."""
    preset: str | None = from_json(spec_json).get("preset") if _NAMES_A_PRESET.search(spec_json) else None
    return preset


def etag(row: JobRow) -> str:
    """The ETag of a job: changes with its state and with what is desired of it, not with every training step."""
    return f'"{row.version}"'


def attempt_public(row: AttemptRow) -> AttemptPublic:
    ended = row.exit or {}
    failure = ended.get("first_failure")
    return AttemptPublic(
        id=row.id,
        number=row.number,
        state=row.state,
        world_size=row.world_size,
        nodes=tuple(str(node) for node in row.nodes),
        from_checkpoint=row.from_checkpoint,
        from_step=row.from_step,
        to_step=row.to_step,
        phase=row.phase,
        ranks=_ranks(row.ranks),
        exit_reason=row.exit_reason,
        exit_message=str(ended.get("message", "")),
        first_failure=RankFailure.model_validate(failure) if failure else None,
        advice=_advice(row.exit_reason),
        wasted_steps=row.wasted_steps,
        created_at=row.created_at,
        submitted_at=row.submitted_at,
        first_step_at=row.first_step_at,
        last_report_at=row.last_report_at,
        ended_at=row.ended_at,
    )


def event_public(row: EventRow) -> EventPublic:
    return EventPublic(
        seq=row.seq,
        job_id=row.job_id,
        attempt=row.attempt,
        type=row.type,
        message=row.message,
        actor=row.actor,
        data=row.data,
        at=row.at,
    )


def checkpoint_public(row: CheckpointRow, aliases: Sequence[str]) -> CheckpointPublic:
    return CheckpointPublic(
        id=row.id,
        job_id=row.job_id,
        attempt=row.attempt,
        step=row.step,
        num_bytes=row.num_bytes,
        metrics=row.metrics,
        model=network_adapter.validate_python(row.model),
        preprocess=Preprocess.model_validate(row.preprocess),
        aliases=tuple(aliases),
        available=row.valid and row.deleted_at is None,
        pinned=row.pinned,
        origin=None if row.origin is None else WeightOrigin.model_validate(row.origin),
        deleted_at=row.deleted_at,
        created_at=row.created_at,
    )


def _advice(reason: str | None) -> str | None:
    return _ADVICE.get(reason or "")


def _ranks(ranks: Mapping[str, Any]) -> tuple[RankPublic, ...]:
    return tuple(RankPublic.model_validate(ranks[key]) for key in sorted(ranks, key=int))


def _progress(row: JobRow, attempts: Sequence[AttemptRow]) -> Progress:
    total = row.total_steps
    pct = None
    if row.state == JobState.SUCCEEDED:
        pct = 100.0
    elif total:
        pct = round(min(100.0, 100.0 * row.step / total), 2)
    return Progress(step=row.step, total_steps=total, pct=pct, eta_s=_eta_s(row, attempts))


def _eta_s(row: JobRow, attempts: Sequence[AttemptRow]) -> float | None:
    """Steps left at the mean pace of the running attempt since its first step."""
    if row.state != JobState.RUNNING or not row.total_steps or not attempts:
        return None
    last = attempts[-1]
    seconds = _elapsed_s(last.first_step_at, last.last_progress_at)
    # The step that set first_step_at was done before the clock started.
    steps = last.to_step - last.from_step - 1
    if steps < 1 or seconds <= 0:
        return None
    return round(max(0, row.total_steps - last.to_step) * seconds / steps, 1)


def _elapsed_s(start: datetime | None, end: datetime | None) -> float:
    return (end - start).total_seconds() if start is not None and end is not None else 0.0
