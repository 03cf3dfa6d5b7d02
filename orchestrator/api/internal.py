"""For drivers only, with the worker secret: claim an attempt, report; make, begin and end the trials of a search."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from configs.search_wire import SearchLimits, SearchState, TrialBegun, TrialCreate, TrialEnd, TrialEnded, TrialRecord
from configs.wire import ClaimReply, ClaimRequest, ReportBatch, ReportReply
from orchestrator.api.deps import DriverOnly, ServicesDep, body_schema, wire_body
from orchestrator.services import reports, trials
from orchestrator.services.problems import declares

router = APIRouter(prefix="/internal/v1/attempts/{attempt_id}", tags=["internal"], dependencies=[DriverOnly])


@router.post(
    "/claim",
    operation_id="claim_attempt",
    openapi_extra=body_schema(ClaimRequest),
    responses=declares(401, 404, 409, 413, 422, 503),
)
def claim_attempt(
    services: ServicesDep, attempt_id: str, request: Annotated[ClaimRequest, Depends(wire_body(ClaimRequest))]
) -> ClaimReply:
    """Speak for the attempt from now on. The same nonce may claim again; another one may not."""
    return reports.claim_attempt(services.db, attempt_id, request)


@router.post(
    "/reports",
    operation_id="report",
    openapi_extra=body_schema(ReportBatch),
    responses=declares(401, 404, 409, 413, 422, 503),
)
def report(
    services: ServicesDep, attempt_id: str, batch: Annotated[ReportBatch, Depends(wire_body(ReportBatch))]
) -> ReportReply:
    """Store a batch and get orders. A batch that was received before changes nothing."""
    return reports.ingest_report(services.db, attempt_id, batch)


# -- searches ----------------------------------------------------------------------------------------------------------
TrialNumber = Annotated[int, Path(ge=1, le=2**31 - 1)]


@router.get("/search", operation_id="get_search_state", responses=declares(401, 404, 409, 503))
def get_search_state(services: ServicesDep, attempt_id: str) -> SearchState:
    """Everything the driver of a search needs to go on: its trials, with their results."""
    return trials.search_state(services.db, attempt_id)


@router.get("/search/limits", operation_id="get_search_limits", responses=declares(401, 404, 409, 503))
def get_search_limits(services: ServicesDep, attempt_id: str) -> SearchLimits:
    """What users changed of the search since it began."""
    return trials.search_limits(services.db, attempt_id)


@router.post(
    "/trials",
    operation_id="create_trial",
    openapi_extra=body_schema(TrialCreate),
    responses=declares(401, 404, 409, 413, 422, 503),
)
def create_trial(
    services: ServicesDep, attempt_id: str, request: Annotated[TrialCreate, Depends(wire_body(TrialCreate))]
) -> TrialRecord:
    """Add a trial to the search. The same one again changes nothing."""
    return trials.create_trial(services.db, services.store, attempt_id, request)


@router.post("/trials/{number}/begin", operation_id="begin_trial", responses=declares(401, 404, 409, 413, 422, 503))
def begin_trial(services: ServicesDep, attempt_id: str, number: TrialNumber) -> TrialBegun:
    """Write down the trial's next attempt. Again before that has ended: the same one."""
    return trials.begin_trial(services.db, services.store, attempt_id, number)


@router.post(
    "/trials/{number}/end",
    operation_id="end_trial",
    openapi_extra=body_schema(TrialEnd),
    responses=declares(401, 404, 409, 413, 422, 503),
)
def end_trial(
    services: ServicesDep,
    attempt_id: str,
    number: TrialNumber,
    end: Annotated[TrialEnd, Depends(wire_body(TrialEnd))],
) -> TrialEnded:
    """Close an attempt of the trial, whose processes are gone."""
    return trials.end_trial(services.db, services.store, services.settings, attempt_id, number, end)
