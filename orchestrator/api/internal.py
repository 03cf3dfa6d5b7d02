"""For drivers only, with the worker secret: claim an attempt, report."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from configs.wire import ClaimReply, ClaimRequest, ReportBatch, ReportReply
from orchestrator.api.deps import DriverOnly, ServicesDep, body_schema, wire_body
from orchestrator.services import reports
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
