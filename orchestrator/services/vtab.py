"""VTAB suites: a fine-tune for each data set, queued together, and their results in one report.

A suite is its jobs: they carry its name, their data set's and its group's as labels. Each of them is retried, resumed
and watched as any other job is. A job that was retried by hand (`POST /v1/jobs/{id}/retry`) takes its predecessor's
place, for it has the same labels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from configs.errors import FieldError
from configs.states import JobState
from configs.vtab import GROUP_LABEL, SUITE_LABEL, TASK_LABEL, task_spec
from orchestrator.services.auth import Actor
from orchestrator.services.idempotency import Answer, Key, claim, remember
from orchestrator.services.problems import Conflict, Invalid, NotFound, field_error
from orchestrator.services.submission import Request, submit_together
from orchestrator.storage.db import Database
from orchestrator.storage.tables import JobRow
from orchestrator.vtab_schemas import VtabCreate, VtabGroup, VtabReport, VtabResult

TOP1 = "eval/top1"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")


def create_suite(db: Database, actor: Actor, request: VtabCreate, key: Key | None) -> tuple[Answer, bool]:
    """Queue a fine-tune for each data set, all or none. Returns the suite's report as it is answered, and whether that
    is the answer to an earlier request with the same key.

    Raises:
        SpecError: something is wrong with a job; at /tasks/<n>/… where it is about that data set.
        Invalid: two data sets share a name.
        Conflict: there is a suite of that name.
        KeyReused: the key was used for another request.
    """
    _refuse_twins(request)
    with db.session() as session:
        earlier = claim(session, key)
        if earlier is not None:
            return earlier, True
        if _rows(session, request.name):
            raise Conflict(f"There is a suite {request.name!r} already.", hint="Choose another name.")
        wanted = [_request_of(request, number) for number in range(len(request.tasks))]
        submit_together(session, actor, wanted, lambda number, fault: _placed(request, number, fault))
        session.flush()
        report = _report(request.name, _rows(session, request.name))
        answer = Answer(201, report.model_dump_json().encode())
        remember(session, key, answer)
        return answer, False


def get_suite(db: Database, name: str) -> VtabReport:
    """What the suite has found so far. Raises NotFound."""
    # What can be no name is not asked for: PostgreSQL takes no NUL.
    if _NAME.match(name):
        with db.reader() as session:
            rows = _rows(session, name)
            if rows:
                return _report(name, rows)
    raise NotFound(f"There is no suite {name!r}.", hint="`patchwork vtab run` makes one.")


# -- jobs --------------------------------------------------------------------------------------------------------------
def _refuse_twins(request: VtabCreate) -> None:
    seen: set[str] = set()
    for number, task in enumerate(request.tasks):
        if task.name in seen:
            message = f"another data set is called {task.name!r}, too"
            raise Invalid(
                "Two data sets share a name.", errors=[field_error(f"/tasks/{number}/name", message, task.name)]
            )
        seen.add(task.name)


def _request_of(request: VtabCreate, number: int) -> Request:
    task = request.tasks[number]
    spec = task_spec(
        {"source": task.source, "train": task.train, "eval": task.eval},
        init_from=request.init_from,
        steps=request.steps,
        held_out=request.held_out,
        seed=request.seed,
    )
    spec["name"] = f"{request.name} {task.name}"
    spec["labels"] = {SUITE_LABEL: request.name, TASK_LABEL: task.name, GROUP_LABEL: task.group}
    return Request(spec, request.overrides)


def _placed(request: VtabCreate, number: int, fault: FieldError) -> FieldError:
    """A fault of a job description, where the request says what it is about."""
    for field in ("source", "train", "eval"):
        if fault.pointer == f"/data/{field}" or fault.pointer.startswith(f"/data/{field}/"):
            pointer = f"/tasks/{number}/{fault.pointer.removeprefix('/data/')}"
            return FieldError(pointer, fault.message, fault.value, fault.allowed)
    if fault.pointer.startswith("/data/subset"):
        message = f"{request.tasks[number].name}: {fault.message}"
        return FieldError(f"/tasks/{number}/train", message, fault.value, fault.allowed)
    if fault.pointer == "/init_from":
        return fault
    # What else there is was set by the protocol or by an override: the same in every job.
    return FieldError(f"/overrides{fault.pointer}", fault.message, fault.value, fault.allowed)


def _rows(session: Session, name: str) -> list[JobRow]:
    """The suite's jobs, the oldest first."""
    query = select(JobRow).where(JobRow.kind == "finetune", JobRow.labels[SUITE_LABEL].as_string() == name)
    return list(session.scalars(query.order_by(JobRow.created_at, JobRow.id)))


# -- the report --------------------------------------------------------------------------------------------------------
def _report(name: str, rows: Sequence[JobRow]) -> VtabReport:
    by_task = {row.labels.get(TASK_LABEL, row.name): row for row in rows}  # a retried job's copy comes after it
    results = tuple(_result(task, row) for task, row in by_task.items())
    first = json.loads(rows[0].spec_json)
    groups = dict.fromkeys(result.group for result in results)
    return VtabReport(
        name=name,
        init_from=first["init_from"],
        split="test" if first["data"]["holdout"] is None else "held out",
        results=results,
        groups=tuple(_group(group, [r for r in results if r.group == group]) for group in groups),
        num_done=sum(result.top1 is not None for result in results),
        top1=_mean(result.top1 for result in results),
        made_at=datetime.now(UTC),
    )


def _result(task: str, row: JobRow) -> VtabResult:
    is_done = row.state == JobState.SUCCEEDED
    return VtabResult(
        task=task,
        group=row.labels.get(GROUP_LABEL, "all"),
        job_id=row.id,
        state=row.state,
        reason=row.reason,
        step=row.step,
        total_steps=row.total_steps,
        top1=row.last_metrics.get(TOP1) if is_done else None,
    )


def _group(name: str, results: Sequence[VtabResult]) -> VtabGroup:
    done = sum(result.top1 is not None for result in results)
    return VtabGroup(name=name, num_tasks=len(results), num_done=done, top1=_mean(result.top1 for result in results))


def _mean(values: Iterable[float | None]) -> float | None:
    """None if one of them is not there yet."""
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known and len(known) == len(found) else None
