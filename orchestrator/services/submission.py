"""From what a user sends to a job in the queue.

    parse -> data set and checkpoint it names -> resolve -> plan -> one transaction: job, event, remembered answer

Everything wrong with a description is said at once, and nothing is stored of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from configs.calibration import Calibration
from configs.data import FolderSource, ImagesSource
from configs.datasets import PLANNING_CARDS, card_for
from configs.errors import FieldError, SpecError, close_matches, to_pointer
from configs.ids import JOB_ID, new_job_id
from configs.load import apply_overrides, parse_for_plan, parse_spec, parse_text
from configs.plan import Plan, plan, plan_of_trials
from configs.probe_cards import fill_probes, probed_sources
from configs.resolve import SourceCheckpoint, canonical_json, data_of, resolve, spec_hash, training_fingerprint
from configs.search_trials import check_search, resolve_search, undecided, with_fixed_base
from configs.spec import (
    EvaluateJob,
    ExportJob,
    FinetuneJob,
    ImportJob,
    InspectJob,
    JobSpec,
    PretrainJob,
    SearchJob,
    TrainingJob,
)
from configs.states import JobState
from configs.wire import DatasetCard
from orchestrator.control.transitions import enqueue
from orchestrator.control.trials import copy_trials
from orchestrator.schemas import JobCreate, JobPreview
from orchestrator.services.auth import Actor
from orchestrator.services.calibration import calibrate
from orchestrator.services.idempotency import Answer, Key, claim, remember
from orchestrator.services.images import missing_images
from orchestrator.services.jobs import check_action, find_job, new_job_json
from orchestrator.services.places import BEFORE
from orchestrator.services.sources import find_source
from orchestrator.storage.db import Database
from orchestrator.storage.events import lock_job, record
from orchestrator.storage.registry import resolve_ref
from orchestrator.storage.tables import CheckpointRow, DatasetRow, JobRow, SearchRow

_Found = TypeVar("_Found")
_NO_DATABASE = Session()
"""Nothing may be asked of it: it would raise."""


@dataclass(frozen=True)
class Request:
    """What the client sent: well-formed, not yet checked."""

    spec: dict[str, Any]
    overrides: dict[str, Any]
    gpu: str | None = None

    @property
    def submitted(self) -> dict[str, Any]:
        return {"spec": self.spec, "overrides": self.overrides}


@dataclass(frozen=True)
class Prepared:
    """A job description with everything known of it before it is queued."""

    spec: JobSpec
    dataset: DatasetCard | None
    init_from: str | None
    """A checkpoint id, or job_…/best while that job is still to leave one."""
    plan: Plan


@dataclass(frozen=True)
class Submitted:
    """The answer to a submission, new or replayed."""

    job_id: str
    answer: Answer
    replayed: bool


def parse_request(body: bytes, *, is_yaml: bool, model: type[JobCreate] = JobCreate) -> Request:
    """A request body with the fields of `model`, or, as YAML, a job file as it is.

    Raises:
        SpecError: it is neither.
    """
    raw = parse_text(body)
    if is_yaml and "spec" not in raw:
        return Request(raw, {})
    fields = tuple(model.model_fields)
    faults = [
        FieldError(
            to_pointer([key]), f"unknown field {key!r}.{close_matches(key, fields)}", raw[key], ", ".join(fields)
        )
        for key in raw
        if key not in fields
    ]
    spec, overrides, gpu = raw.get("spec"), raw.get("overrides", {}), raw.get("gpu")
    if not isinstance(spec, dict):
        faults.append(FieldError("/spec", "expected the job description, a mapping", spec, "a mapping"))
    if not isinstance(overrides, dict):
        faults.append(FieldError("/overrides", "expected a mapping of dotted keys", overrides, "a mapping"))
    if not (gpu is None or isinstance(gpu, str)):
        faults.append(FieldError("/gpu", "expected a GPU and a count", gpu, "text such as H100:8"))
    if faults:
        raise SpecError(faults)
    assert isinstance(spec, dict)
    assert isinstance(overrides, dict)
    return Request(spec, overrides, gpu)


def submit_job(db: Database, actor: Actor, request: Request, key: Key | None) -> Submitted:
    """Queue a job, once per Idempotency-Key.

    Raises:
        SpecError: the description is not valid.
        KeyReused: the key was used for another request.
    """
    rest = _begin_to_prepare(request)
    with db.session() as session:
        earlier = claim(session, key)
        if earlier is not None:
            return replayed(earlier)
        prepared, row = rest(session)
        return queue_prepared(session, actor, row, prepared, key)


def queue_prepared(session: Session, actor: Actor, row: JobRow, prepared: Prepared, key: Key | None) -> Submitted:
    """Queue a job with what its kind needs beside it, in the caller's transaction."""
    submitted = insert_job(session, actor, row, key)
    if isinstance(prepared.spec, SearchJob):
        session.add(SearchRow(job_id=submitted.job_id, num_trials=prepared.spec.budget.trials))
    return submitted


def queue_import(session: Session, actor: Actor, document: dict[str, Any]) -> str:
    """Queue the import of an uploaded file, in the caller's transaction; returns the job's id. Raises SpecError."""
    spec = parse_spec(document)
    row = job_row(Request(document, {}), Prepared(spec, None, None, plan(spec, None)))
    return insert_job(session, actor, row, None).job_id


def submit_together(
    session: Session, actor: Actor, requests: Sequence[Request], place: Callable[[int, FieldError], FieldError]
) -> tuple[str, ...]:
    """Queue several jobs, all or none, in the caller's transaction; returns their ids.

    Raises:
        SpecError: with every fault of every description, where `place` puts what is wrong with the n-th of them.
    """
    faults: dict[tuple[str, str], FieldError] = {}
    rows = []
    for number, request in enumerate(requests):
        try:
            rows.append(job_row(request, prepare(session, request, hold=True)))
        except SpecError as error:
            for fault in (place(number, fault) for fault in error.errors):
                faults.setdefault((fault.pointer, fault.message), fault)
    if faults:
        raise SpecError(list(faults.values()))
    return tuple(insert_job(session, actor, row, None).job_id for row in rows)


def preview_job(db: Database, request: Request) -> JobPreview:
    """What `submit_job` would store. Raises SpecError."""
    with db.reader() as session:
        prepared = prepare(session, request, hold=False)
    stored = canonical_json(prepared.spec)
    return JobPreview(
        kind=prepared.spec.kind,
        name=prepared.spec.name,
        project=prepared.spec.queue.project,
        spec=json.loads(stored),
        spec_hash=spec_hash(stored),
        plan=prepared.plan.model_dump(mode="json"),
    )


def plan_job(db: Database, request: Request) -> Plan:
    """The plan of a job description. Data that is not here and a checkpoint that does not exist yet can be planned
    with, as long as they decide nothing.

    Raises:
        SpecError: with a pointer for every fault.
    """
    with db.reader() as session:
        calibration = calibrate(session)
        spec = _parse(request, for_plan=True)
        if isinstance(spec, SearchJob):
            return _plan_search(session, spec, request.gpu, calibration)
        spec, card, source, _ = _look_up(session, spec, for_plan=True, hold=False)
    return plan(spec, card, request.gpu, source, calibration)


def retry_job(db: Database, actor: Actor, job_id: str, resume: bool, key: Key | None) -> Submitted:
    """Queue a copy of a job that failed or was cancelled. With `resume` it continues from the old job's last
    checkpoint, or where that one, itself a retry, was to continue from; if there is neither, it starts over.

    Raises:
        NotFound: there is no such job.
        WrongState: it did not fail and was not cancelled.
        SpecError: the checkpoint it started from is gone.
        KeyReused: the key was used for another request.
    """
    with db.session() as session:
        earlier = claim(session, key)
        if earlier is not None:
            return replayed(earlier)
        find_job(session, job_id)
        # Before the checkpoint's row: retention takes the two locks in this order, too.
        old = lock_job(session, job_id)
        assert old is not None, "jobs are never deleted"
        check_action(old, "retry")
        checkpoint = _last_checkpoint(session, old) if resume else None
        if old.init_from is not None and checkpoint is None and "/" not in old.init_from:
            require_checkpoint(session, old.init_from)
        row = copy_job(old, checkpoint)
        submitted = insert_job(session, actor, row, key)
        if old.kind == "search":
            limits = session.get_one(SearchRow, old.id)
            copy_trials(session, old, row.id, limits.num_trials)
        how = f"from step {checkpoint.step}" if checkpoint is not None else "from the start"
        record(session, job_id, "job.retried", f"Retried as {row.id}, {how}", actor.name, data={"job_id": row.id})
        return submitted


def _last_checkpoint(session: Session, old: JobRow) -> CheckpointRow | None:
    own = resolve_ref(session, f"{old.id}/latest", hold=True)
    if own is not None or old.resume_from is None:
        return own
    return resolve_ref(session, old.resume_from, hold=True)


def _begin_to_prepare(request: Request) -> Callable[[Session], tuple[Prepared, JobRow]]:
    """Do as much of `prepare` as needs no database, all of it for most trainings: before the transaction, in which
    SQLite's other writers would wait for it. Returns the rest, for within the transaction; only there is raised what is
    wrong, since the answer to a repeated request goes before it."""

    def finish(prepared: Prepared) -> tuple[Prepared, JobRow]:
        return prepared, job_row(request, prepared)

    def refuse(_: Session) -> tuple[Prepared, JobRow]:
        raise fault

    try:
        spec = _parse(request, for_plan=False)
        if _is_alone(spec):
            made = finish(_prepare(_NO_DATABASE, spec, hold=False))
            return lambda _: made
    except SpecError as error:
        fault = error
        return refuse
    return lambda session: finish(_prepare(session, spec, hold=True))


def _is_alone(spec: JobSpec) -> bool:
    """Whether it starts from scratch and names nothing that is in the database: no job, no data set of ours."""
    if not isinstance(spec, PretrainJob) or spec.queue.depends_on:
        return False
    sources = (spec.data.source, *probed_sources(spec))
    return not any(isinstance(source, FolderSource | ImagesSource) for source in sources)


def prepare(session: Session, request: Request, *, hold: bool) -> Prepared:
    """Check, resolve and plan a job description against the data sets and checkpoints there are. With `hold` the
    checkpoint it starts from stays until this transaction ends.

    Raises:
        SpecError: with a pointer for every fault.
    """
    return _prepare(session, _parse(request, for_plan=False), hold=hold)


def _prepare(session: Session, spec: JobSpec, *, hold: bool) -> Prepared:
    if isinstance(spec, SearchJob):
        return _prepare_search(session, spec, hold=hold)
    spec, card, source, init_from = _look_up(session, spec, for_plan=False, hold=hold)
    resolved = resolve(spec, card, source)
    return Prepared(resolved, card, init_from, plan(spec, card, None, source, resolved=resolved))


def _prepare_search(session: Session, search: SearchJob, *, hold: bool) -> Prepared:
    """A search whose space was tried at its corners: each of them a whole job."""
    _check_dependencies(session, search)
    made: list[Prepared] = []

    def complete(raw: dict[str, Any]) -> TrainingJob:
        prepared = prepare(session, Request(raw, {}), hold=hold)
        assert isinstance(prepared.spec, TrainingJob), "trials are trainings"
        made.append(prepared)
        return prepared.spec

    # What a preset says now is what every trial is made of, however long the search goes on.
    search = with_fixed_base(search)
    resolved = resolve_search(search, check_search(search, complete))
    return Prepared(resolved, None, made[0].init_from, plan_of_trials(resolved, made[0].plan))


def _plan_search(session: Session, search: SearchJob, gpu: str | None, calibration: Calibration) -> Plan:
    """The plan of a search whose base may name a checkpoint that does not exist yet."""
    _check_dependencies(session, search)
    made: list[Plan] = []

    def complete(raw: dict[str, Any]) -> TrainingJob:
        spec, card, source, _ = _look_up(session, parse_spec(raw), for_plan=True, hold=False)
        resolved = resolve(spec, card, source)
        assert isinstance(resolved, TrainingJob), "trials are trainings"
        if not made:
            made.append(plan(spec, card, gpu, source, calibration, resolved))
        return resolved

    search = with_fixed_base(undecided(search))
    return plan_of_trials(resolve_search(search, check_search(search, complete)), made[0])


def registered_datasets(session: Session) -> dict[str, DatasetCard]:
    """Cards of the folders that were registered, by name."""
    return {row.name: DatasetCard.model_validate(row.card) for row in session.scalars(select(DatasetRow))}


# -- what a description refers to --------------------------------------------------------------------------------------
def _look_up(
    session: Session, spec: JobSpec, *, for_plan: bool, hold: bool
) -> tuple[JobSpec, DatasetCard | None, SourceCheckpoint | None, str | None]:
    """The spec with its data set's card, the checkpoint it starts from, and how that is stored."""
    if isinstance(spec, ImportJob):
        raise SpecError.at(
            "/kind",
            "an import begins with its file: POST /v1/checkpoints:import, or `patchwork import`",
            "import",
            "pretrain, finetune, evaluate, inspect, export, search",
        )
    faults: list[FieldError] = []
    source, init_from = None, None
    if isinstance(spec, FinetuneJob | EvaluateJob | InspectJob | ExportJob):
        reference = spec.init_from
        unneeded = for_plan and isinstance(spec, FinetuneJob) and spec.model.has_sizes
        found = _collect(
            [] if unneeded else faults, lambda: find_source(session, reference, spec.queue.depends_on, hold=hold)
        )
        source, init_from = found or (None, None)
    data = data_of(spec, source)
    known: Mapping[str, DatasetCard] = {}
    named = [*probed_sources(spec), *([] if data is None else [data.source])]
    if any(isinstance(one, FolderSource) for one in named):
        known = registered_datasets(session)
    if for_plan:
        known = {**PLANNING_CARDS, **known}
    card = None if data is None else _collect(faults, lambda: card_for(data.source, known))
    if data is not None and isinstance(data.source, ImagesSource):
        faults.extend(missing_images(session, data.source, hold=hold))
    filled = _collect(faults, lambda: fill_probes(spec, known))
    _collect(faults, lambda: _check_dependencies(session, spec))
    if faults or filled is None:
        raise SpecError(faults)
    return filled, card, source, init_from


def _parse(request: Request, *, for_plan: bool) -> JobSpec:
    raw = apply_overrides(request.spec, request.overrides)
    return parse_for_plan(raw) if for_plan else parse_spec(raw)


def _collect(faults: list[FieldError], step: Callable[[], _Found]) -> _Found | None:
    """The result of `step`; what it finds wrong is added to `faults` instead of being raised."""
    try:
        return step()
    except SpecError as error:
        faults.extend(error.errors)
        return None


def _check_dependencies(session: Session, spec: JobSpec) -> None:
    faults = []
    for index, job_id in enumerate(spec.queue.depends_on):
        row = session.get(JobRow, job_id) if JOB_ID.match(job_id) else None
        if row is None:
            message = f"there is no job {job_id!r}"
        elif row.state in (JobState.FAILED, JobState.CANCELLED):
            message = f"job {job_id} has {row.state.lower()}: this one could never start"
        else:
            continue
        faults.append(FieldError(f"/queue/depends_on/{index}", message, job_id, "a job that has not failed"))
    if faults:
        raise SpecError(faults)


def require_checkpoint(session: Session, checkpoint_id: str) -> None:
    """Hold a checkpoint until this transaction ends. Raises SpecError: it is gone."""
    if resolve_ref(session, checkpoint_id, hold=True) is None:
        raise SpecError.at("/init_from", f"checkpoint {checkpoint_id} was deleted", checkpoint_id)


# -- rows ------------------------------------------------------------------------------------------------------------
def job_row(request: Request, prepared: Prepared) -> JobRow:
    """The row of a new job, in no session yet."""
    spec, card = prepared.spec, prepared.dataset
    stored = canonical_json(spec)
    return JobRow(
        id=new_job_id(),
        kind=spec.kind,
        name=spec.name,
        project=spec.queue.project,
        labels=dict(spec.labels),
        submitted=request.submitted,
        spec_json=stored,
        spec_hash=spec_hash(stored),
        training_fingerprint=training_fingerprint(spec, card.fingerprint if card is not None else ""),
        dataset=card.model_dump(mode="json") if card is not None else None,
        init_from=prepared.init_from,
        plan=prepared.plan.model_dump(mode="json"),
        priority=spec.queue.priority,
        total_steps=_total(spec),
    )


def _total(spec: JobSpec) -> int | None:
    """Steps of a training, trials of a search."""
    if isinstance(spec, SearchJob):
        return spec.budget.trials
    return spec.schedule.total_steps if isinstance(spec, TrainingJob) else None


_COPIED = (
    "kind",
    "name",
    "project",
    "labels",
    "submitted",
    "spec_json",
    "spec_hash",
    "training_fingerprint",
    "dataset",
    "init_from",
    "plan",
    "priority",
    "total_steps",
)


def copy_job(old: JobRow, checkpoint: CheckpointRow | None) -> JobRow:
    """A new job as `old` was, in no session yet; with `checkpoint` it goes on from there."""
    return JobRow(
        id=new_job_id(),
        retry_of=old.id,
        resume_from=checkpoint.id if checkpoint is not None else None,
        step=checkpoint.step if checkpoint is not None else 0,
        **{field: getattr(old, field) for field in _COPIED},
    )


def insert_job(session: Session, actor: Actor, row: JobRow, key: Key | None) -> Submitted:
    """Queue a new job in this transaction, and remember the answer to the request with this key."""
    row.created_by = actor.name
    num_before: int = enqueue(session, row, actor=actor.name, at=datetime.now(UTC), asked=BEFORE)
    answer = Answer(201, new_job_json(row, num_before))
    remember(session, key, answer)
    return Submitted(row.id, answer, replayed=False)


def replayed(answer: Answer) -> Submitted:
    """The answer to a request that came before."""
    return Submitted(json.loads(answer.body)["id"], answer, replayed=True)
