"""Checkpoints, exports and reports, and their files."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path
from fastapi.responses import RedirectResponse, Response, StreamingResponse

from configs.wire import EvaluationReport, Manifest
from orchestrator.api.deps import (
    CheckpointId,
    JobId,
    Member,
    Services,
    ServicesDep,
    Viewer,
    body_schema,
    json_body,
)
from orchestrator.api.examples import PIN
from orchestrator.schemas import CheckpointEdit, CheckpointPage, CheckpointPublic, ExportPage
from orchestrator.services import checkpoints
from orchestrator.services.checkpoints import StoredFile
from orchestrator.services.problems import declares

router = APIRouter(prefix="/v1", tags=["checkpoints"])
PRESIGNED_FOR_S = 3600
FileName = Annotated[str, Path(description="As the manifest spells it.")]
Range = Annotated[str | None, Header(description="One range.", examples=["bytes=0-1048575"])]
IfRange = Annotated[str | None, Header()]
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole file.", "content": _BYTES},
    206: {"description": "The range asked for.", "content": _BYTES},
    307: {"description": "Where clients reach the object store: a URL that is good for an hour."},
    **declares(401, 404, 416, 422, 503),
}


@router.get("/jobs/{job_id}/checkpoints", operation_id="list_checkpoints", responses=declares(401, 404, 503))
def list_checkpoints(services: ServicesDep, _: Viewer, job_id: JobId) -> CheckpointPage:
    """The job's checkpoints, the newest first; deleted ones stay listed."""
    return checkpoints.list_checkpoints(services.db, job_id)


@router.get("/checkpoints/{checkpoint_id}", operation_id="get_checkpoint", responses=declares(401, 404, 503))
def get_checkpoint(services: ServicesDep, _: Viewer, checkpoint_id: CheckpointId) -> CheckpointPublic:
    """One checkpoint."""
    return checkpoints.get_checkpoint(services.db, checkpoint_id)


@router.patch(
    "/checkpoints/{checkpoint_id}",
    operation_id="edit_checkpoint",
    openapi_extra=body_schema(CheckpointEdit, examples={"keep it": PIN}),
    responses=declares(401, 403, 404, 409, 413, 422, 503),
)
def edit_checkpoint(
    services: ServicesDep,
    actor: Member,
    checkpoint_id: CheckpointId,
    wanted: Annotated[CheckpointEdit, Depends(json_body(CheckpointEdit))],
) -> CheckpointPublic:
    """Pin a checkpoint, so that it is kept, or let go of it."""
    return checkpoints.edit_checkpoint(services.db, actor, checkpoint_id, wanted)


@router.get("/checkpoints/{checkpoint_id}/manifest", operation_id="get_manifest", responses=declares(401, 404, 503))
def get_manifest(services: ServicesDep, _: Viewer, checkpoint_id: CheckpointId) -> Manifest:
    """Its files, with sizes and checksums of every 8 MiB block: what a download is verified against."""
    return checkpoints.get_manifest(services.db, services.store, checkpoint_id)


@router.get("/checkpoints/{checkpoint_id}/files/{name:path}", operation_id="get_checkpoint_file", responses=_FILE)
def get_checkpoint_file(
    services: ServicesDep,
    _: Viewer,
    checkpoint_id: CheckpointId,
    name: FileName,
    range: Range = None,
    if_range: IfRange = None,
) -> Response:
    """A file of a checkpoint, whole or in part."""
    file = checkpoints.checkpoint_file(services.db, services.store, checkpoint_id, name)
    return _send(services, file, range, if_range)


@router.get("/jobs/{job_id}/exports", operation_id="list_exports", tags=["exports"], responses=declares(401, 404, 503))
def list_exports(services: ServicesDep, _: Viewer, job_id: JobId) -> ExportPage:
    """What an export job made."""
    return checkpoints.list_exports(services.db, services.store, job_id)


@router.get(
    "/jobs/{job_id}/exports/{fmt}/files/{name:path}",
    operation_id="get_export_file",
    tags=["exports"],
    responses=_FILE,
)
def get_export_file(
    services: ServicesDep,
    _: Viewer,
    job_id: JobId,
    fmt: Annotated[str, Path(examples=["safetensors"])],
    name: FileName,
    range: Range = None,
    if_range: IfRange = None,
) -> Response:
    """A file of an export, whole or in part."""
    file = checkpoints.export_file(services.db, services.store, job_id, fmt, name)
    return _send(services, file, range, if_range)


@router.get("/jobs/{job_id}/report", operation_id="get_report", tags=["exports"], responses=declares(401, 404, 503))
def get_report(services: ServicesDep, _: Viewer, job_id: JobId) -> EvaluationReport:
    """What an evaluate job found."""
    return checkpoints.get_report(services.db, services.store, job_id)


def _send(services: Services, file: StoredFile, range_header: str | None, if_range: str | None) -> Response:
    if services.settings.s3_public:
        return RedirectResponse(services.store.presign(file.key, PRESIGNED_FOR_S), status_code=307)
    # If-Range with another ETag: the client's part is of another file, it gets the whole of this one.
    wanted = None if if_range not in (None, file.etag) else checkpoints.parse_range(range_header, file.size)
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": file.etag,
        "Content-Length": str(file.size if wanted is None else wanted.length),
        "Cache-Control": "private, max-age=31536000, immutable",
    }
    if wanted is not None:
        headers["Content-Range"] = f"bytes {wanted.start}-{wanted.end}/{file.size}"
    chunks = checkpoints.stream_file(services.store, file, wanted)
    status = 200 if wanted is None else 206
    return StreamingResponse(chunks, status, headers, media_type="application/octet-stream")
