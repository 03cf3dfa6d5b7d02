"""Searches: how far they are, their trials, what they found; more trials. (They are submitted as jobs are.)"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from configs.search_wire import SearchReport
from orchestrator.api.deps import IdempotencyKey, JobId, Member, ServicesDep, Viewer, body_schema, json_body
from orchestrator.schemas import JobPublic
from orchestrator.search_schemas import SearchPublic, SlotsSet, TrialPage, TrialPublic, TrialsAdd
from orchestrator.services import searches
from orchestrator.services.idempotency import key_for
from orchestrator.services.problems import declares

router = APIRouter(prefix="/v1/searches/{job_id}", tags=["searches"])


@router.get("", operation_id="get_search", responses=declares(401, 404, 503))
def get_search(services: ServicesDep, _: Viewer, job_id: JobId) -> SearchPublic:
    """A search: its job, how many trials it made, and the best one so far."""
    return searches.get_search(services.db, job_id)


@router.get("/trials", operation_id="list_trials", responses=declares(401, 404, 422, 503))
def list_trials(
    services: ServicesDep,
    _: Viewer,
    job_id: JobId,
    curves: Annotated[bool, Query(description="With each trial's curve of the metric.")] = False,
) -> TrialPage:
    """The search's trials, by number."""
    return searches.list_trials(services.db, job_id, curves)


@router.get("/best", operation_id="get_best_trial", responses=declares(401, 404, 503))
def get_best_trial(services: ServicesDep, _: Viewer, job_id: JobId) -> TrialPublic:
    """The best trial so far. Its checkpoint is an ordinary one: fork it, evaluate it, export it, fetch it."""
    return searches.get_best(services.db, job_id)


@router.get("/report", operation_id="get_search_report", responses=declares(401, 404, 503))
def get_search_report(services: ServicesDep, _: Viewer, job_id: JobId) -> SearchReport:
    """What a search that has succeeded found: settings ranked, importances, cost."""
    return searches.get_report(services.db, services.store, job_id)


@router.get(
    "/report.png",
    operation_id="get_search_picture",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **declares(401, 404, 503)},
)
def get_search_picture(services: ServicesDep, _: Viewer, job_id: JobId) -> Response:
    """The report as a picture: history, curves, parallel coordinates, importances."""
    return Response(searches.get_picture(services.db, services.store, job_id), media_type="image/png")


@router.post(
    "/trials",
    status_code=202,
    operation_id="add_trials",
    openapi_extra=body_schema(TrialsAdd, examples={"ten": {"trials": 10}}),
    responses={
        201: {"model": JobPublic, "description": "The search had ended: the job that goes on with it."},
        202: {"model": JobPublic, "description": "The search itself makes them."},
        **declares(401, 403, 404, 409, 413, 422, 503),
    },
)
def add_trials(
    services: ServicesDep,
    actor: Member,
    job_id: JobId,
    request: Annotated[TrialsAdd, Depends(json_body(TrialsAdd))],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Let a search make more trials; one that has ended goes on as a new job that knows them all."""
    key = key_for(actor, idempotency_key, b"add_trials", job_id.encode(), str(request.trials).encode())
    submitted = searches.add_trials(services.db, actor, job_id, request.trials, key)
    headers = {"Location": f"/v1/jobs/{submitted.job_id}"}
    if submitted.replayed:
        headers["Idempotent-Replayed"] = "true"
    return Response(submitted.answer.body, submitted.answer.status, headers, media_type="application/json")


@router.post(
    "/slots",
    operation_id="set_slots",
    openapi_extra=body_schema(SlotsSet, examples={"two": {"slots": 2}}),
    responses=declares(401, 403, 404, 409, 413, 422, 503),
)
def set_slots(
    services: ServicesDep, actor: Member, job_id: JobId, request: Annotated[SlotsSet, Depends(json_body(SlotsSet))]
) -> SearchPublic:
    """How many trials may run side by side from now on; those that run go on."""
    return searches.set_slots(services.db, actor, job_id, request.slots)
