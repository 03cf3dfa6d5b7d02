"""Jobs: submit, look, steer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from configs.plan import Plan
from configs.states import JobState
from orchestrator.api.deps import (
    Cursor,
    IdempotencyKey,
    JobId,
    Limit,
    Member,
    PrintableText,
    RawBody,
    Services,
    ServicesDep,
    Viewer,
    body_schema,
    json_body,
    services_of,
)
from orchestrator.api.examples import EDIT, EXPORT, FINETUNE, FORK, INSPECT, PRETRAIN
from orchestrator.schemas import JobCreate, JobEdit, JobFork, JobPage, JobPreview, JobPublic, PlanCreate
from orchestrator.services import edits, forks, jobs, submission
from orchestrator.services.auth import Actor
from orchestrator.services.idempotency import key_for
from orchestrator.services.problems import declares

router = APIRouter(prefix="/v1", tags=["jobs"])
IfMatch = Annotated[str | None, Header(max_length=200, description="Act only on this version (a job's etag).")]
_SUBMIT_BODY = body_schema(
    JobCreate,
    yaml=True,
    examples={"pretrain": PRETRAIN, "finetune": FINETUNE, "inspect": INSPECT, "export": EXPORT},
)
_PLAN_BODY = body_schema(PlanCreate, yaml=True, examples={"pretrain": {**PRETRAIN, "gpu": "H100:8"}})


def is_yaml(request: Request) -> bool:
    """Whether the body is a job file rather than {"spec": …}."""
    return "yaml" in request.headers.get("content-type", "").lower()


@router.post(
    "/jobs",
    status_code=201,
    operation_id="create_job",
    openapi_extra=_SUBMIT_BODY,
    responses={
        200: {"model": JobPreview, "description": "With dry_run: what would be stored. Nothing is."},
        201: {"model": JobPublic, "description": "Queued; or replayed, then with Idempotent-Replayed: true."},
        **declares(401, 403, 409, 413, 422, 503),
    },
)
async def create_job(
    request: Request,
    actor: Member,
    idempotency_key: IdempotencyKey = None,
    dry_run: Annotated[bool, Query(description="Check and plan only.")] = False,
) -> Response:
    """Submit a job. Everything wrong with it is said at once; nothing is stored of it then."""
    # Not as dependencies: FastAPI goes through all kinds of parameters for each, and jobs come by the thousand.
    body, services = await request.body(), services_of(request)
    return await run_in_threadpool(_create_job, services, actor, body, is_yaml(request), idempotency_key, dry_run)


def _create_job(
    services: Services, actor: Actor, body: bytes, yaml: bool, idempotency_key: str | None, dry_run: bool
) -> Response:
    parsed = submission.parse_request(body, is_yaml=yaml)
    if dry_run:
        return JSONResponse(submission.preview_job(services.db, parsed).model_dump(mode="json"))
    key = key_for(actor, idempotency_key, b"create_job", b"yaml" if yaml else b"json", body)
    return _created(submission.submit_job(services.db, actor, parsed, key))


@router.post(
    "/jobs/{job_id}/retry",
    status_code=201,
    operation_id="retry_job",
    responses={201: {"model": JobPublic}, **declares(401, 403, 404, 409, 413, 422, 503)},
)
def retry_job(
    services: ServicesDep,
    actor: Member,
    job_id: JobId,
    idempotency_key: IdempotencyKey = None,
    resume: Annotated[bool, Query(description="Continue from the job's last checkpoint, if it left one.")] = True,
) -> Response:
    """Queue a copy of a job that failed or was cancelled."""
    key = key_for(actor, idempotency_key, b"retry_job", job_id.encode(), str(resume).encode())
    return _created(submission.retry_job(services.db, actor, job_id, resume, key))


@router.post(
    "/jobs/{job_id}/fork",
    status_code=201,
    operation_id="fork_job",
    openapi_extra=body_schema(JobFork, examples={"on other workers": FORK}),
    responses={201: {"model": JobPublic}, **declares(401, 403, 404, 409, 413, 422, 503)},
)
def fork_job(
    services: ServicesDep,
    actor: Member,
    job_id: JobId,
    body: RawBody,
    wanted: Annotated[JobFork, Depends(json_body(JobFork))],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue a new job made of this one: its description with changes, from the start or from one of its checkpoints."""
    key = key_for(actor, idempotency_key, b"fork_job", job_id.encode(), body)
    return _created(forks.fork_job(services.db, actor, job_id, wanted, key))


def _created(submitted: submission.Submitted) -> Response:
    headers = {"Location": f"/v1/jobs/{submitted.job_id}"}
    if submitted.replayed:
        headers["Idempotent-Replayed"] = "true"
    return Response(submitted.answer.body, submitted.answer.status, headers, media_type="application/json")


@router.post("/plans", operation_id="create_plan", openapi_extra=_PLAN_BODY, responses=declares(401, 413, 422, 503))
def create_plan(request: Request, services: ServicesDep, _: Viewer, body: RawBody) -> Plan:
    """Say what a job would take: memory by ZeRO stage, steps, operations, hours. Nothing is stored."""
    parsed = submission.parse_request(body, is_yaml=is_yaml(request), model=PlanCreate)
    return submission.plan_job(services.db, parsed)


@router.get(
    "/jobs",
    operation_id="list_jobs",
    responses={200: {"model": JobPage, "description": "A page."}, **declares(401, 422, 503)},
)
def list_jobs(
    services: ServicesDep,
    _: Viewer,
    state: Annotated[list[JobState] | None, Query(description="Any of these.")] = None,
    kind: Annotated[PrintableText | None, Query(examples=["pretrain"])] = None,
    project: Annotated[PrintableText | None, Query()] = None,
    label: Annotated[list[PrintableText] | None, Query(description="key=value; all of them.")] = None,
    name: Annotated[PrintableText | None, Query(description="A part of the name, in any case.")] = None,
    search: Annotated[PrintableText | None, Query(description="The trials of this search.")] = None,
    sort: Annotated[jobs.Sort, Query(description="-: the largest or latest first.")] = "-created",
    count: Annotated[bool, Query(description="Say in num_matching how many there are in all.")] = False,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Response:
    """Jobs, the newest first or as sorted; trials only with their search's id."""
    wanted = jobs.JobFilter(tuple(state or ()), kind, project, name, tuple(label or ()), search)
    num_matching = jobs.count_jobs(services.db, wanted) if count else None
    page = jobs.list_jobs_json(services.db, wanted, limit, cursor, sort, num_matching)
    return Response(page, media_type="application/json")


@router.get(
    "/jobs/{job_id}",
    operation_id="get_job",
    responses={200: {"model": JobPublic, "description": "The job."}, **declares(401, 404, 503)},
)
def get_job(services: ServicesDep, _: Viewer, job_id: JobId) -> Response:
    """One job: what was asked, where it stands, what it cost."""
    job, etag = jobs.get_job_json(services.db, job_id)
    return Response(job, headers={"ETag": etag}, media_type="application/json")


@router.patch(
    "/jobs/{job_id}",
    operation_id="edit_job",
    openapi_extra=body_schema(JobEdit, examples={"first in line": EDIT}),
    responses=declares(401, 403, 404, 409, 412, 413, 422, 503),
)
def edit_job(
    services: ServicesDep,
    actor: Member,
    job_id: JobId,
    response: Response,
    wanted: Annotated[JobEdit, Depends(json_body(JobEdit))],
    if_match: IfMatch = None,
) -> JobPublic:
    """Change a job's priority, while it has not ended, or its labels."""
    return _with_etag(edits.edit_job(services.db, actor, job_id, wanted, if_match), response)


_STEERED: dict[int | str, dict[str, Any]] = declares(401, 403, 404, 409, 412, 413, 422, 503)


@router.post("/jobs/{job_id}/cancel", status_code=202, operation_id="cancel_job", responses=_STEERED)
def cancel_job(
    services: ServicesDep, actor: Member, job_id: JobId, response: Response, if_match: IfMatch = None
) -> JobPublic:
    """Ask for the job's end. A running job saves a checkpoint and leaves."""
    return _with_etag(jobs.cancel_job(services.db, actor, job_id, if_match), response)


@router.post("/jobs/{job_id}/pause", status_code=202, operation_id="pause_job", responses=_STEERED)
def pause_job(
    services: ServicesDep, actor: Member, job_id: JobId, response: Response, if_match: IfMatch = None
) -> JobPublic:
    """Ask the job to save a checkpoint and leave its workers until it is resumed."""
    return _with_etag(jobs.pause_job(services.db, actor, job_id, if_match), response)


@router.post("/jobs/{job_id}/resume", status_code=202, operation_id="resume_job", responses=_STEERED)
def resume_job(
    services: ServicesDep,
    actor: Member,
    job_id: JobId,
    response: Response,
    if_match: IfMatch = None,
    idempotency_key: IdempotencyKey = None,
) -> JobPublic:
    """Let a paused job back into the queue. With an Idempotency-Key it may be asked again."""
    key = key_for(actor, idempotency_key, b"resume_job", job_id.encode())
    return _with_etag(jobs.resume_job(services.db, actor, job_id, if_match, key), response)


def _with_etag(job: JobPublic, response: Response) -> JobPublic:
    response.headers["ETag"] = job.etag
    return job
