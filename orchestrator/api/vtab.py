"""VTAB suites: one checkpoint judged by fine-tunes on many data sets, with one setting for all of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Response

from orchestrator.api.deps import IdempotencyKey, Member, ServicesDep, Viewer, body_schema, json_body
from orchestrator.api.examples import VTAB
from orchestrator.services import vtab
from orchestrator.services.idempotency import key_for
from orchestrator.services.problems import declares
from orchestrator.vtab_schemas import VtabCreate, VtabReport

router = APIRouter(prefix="/v1/vtab", tags=["vtab"])
SuiteName = Annotated[str, Path(description="The suite's name.")]


@router.post(
    "",
    status_code=201,
    operation_id="create_vtab_suite",
    openapi_extra=body_schema(VtabCreate, examples={"two": VTAB}),
    responses={201: {"model": VtabReport}, **declares(401, 403, 409, 413, 422, 503)},
)
def create_vtab_suite(
    services: ServicesDep,
    actor: Member,
    request: Annotated[VtabCreate, Depends(json_body(VtabCreate))],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue a fine-tune on 1,000 images of each data set: all of them or, where anything is wrong, none."""
    key = key_for(actor, idempotency_key, b"create_vtab_suite", request.model_dump_json().encode())
    answer, replayed = vtab.create_suite(services.db, actor, request, key)
    headers = {"Location": f"/v1/vtab/{request.name}"}
    if replayed:
        headers["Idempotent-Replayed"] = "true"
    return Response(answer.body, answer.status, headers, media_type="application/json")


@router.get("/{name}", operation_id="get_vtab_suite", responses=declares(401, 404, 503))
def get_vtab_suite(services: ServicesDep, _: Viewer, name: SuiteName) -> VtabReport:
    """What a suite has found so far: top-1 of each data set, and the means of each group and of all, once they are
    known."""
    return vtab.get_suite(services.db, name)
