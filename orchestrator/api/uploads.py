"""What users bring: weights from elsewhere, uploaded to the object store in parts and imported as a checkpoint; and
images to look at."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Response

from orchestrator.api.deps import Member, RawBody, ServicesDep, Viewer, body_schema, json_body
from orchestrator.api.examples import IMPORT, PART_URLS
from orchestrator.schemas import ImagePublic, ImportCreate, JobPublic, PartUrls, PartUrlsCreate, UploadPublic
from orchestrator.services import images, uploads
from orchestrator.services.problems import declares

router = APIRouter(prefix="/v1", tags=["uploads"])
UploadId = Annotated[str, Path(description="upl_…")]


@router.post(
    "/checkpoints:import",
    status_code=201,
    operation_id="import_checkpoint",
    openapi_extra=body_schema(ImportCreate, examples={"timm": IMPORT}),
    responses={
        200: {"model": UploadPublic, "description": "The open upload of the same file: go on with it."},
        201: {"model": UploadPublic, "description": "A new upload."},
        **declares(401, 403, 413, 422, 503),
    },
)
def import_checkpoint(
    services: ServicesDep,
    actor: Member,
    response: Response,
    request: Annotated[ImportCreate, Depends(json_body(ImportCreate))],
) -> UploadPublic:
    """Begin to import a weights file. Its parts are PUT to the URLs of the upload; completing it queues an import job,
    whose checkpoint is an ordinary one."""
    upload, is_new = uploads.create_upload(services.db, services.store, services.settings, actor, request)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/v1/uploads/{upload.id}"
    return upload


@router.get("/uploads/{upload_id}", operation_id="get_upload", responses=declares(401, 404, 503))
def get_upload(services: ServicesDep, _: Viewer, upload_id: UploadId) -> UploadPublic:
    """An upload, and which of its parts have arrived."""
    return uploads.get_upload(services.db, services.store, upload_id)


@router.post(
    "/uploads/{upload_id}/urls",
    operation_id="create_part_urls",
    openapi_extra=body_schema(PartUrlsCreate, examples={"first": PART_URLS}),
    responses=declares(401, 403, 404, 409, 413, 422, 503),
)
def create_part_urls(
    services: ServicesDep,
    _: Member,
    upload_id: UploadId,
    request: Annotated[PartUrlsCreate, Depends(json_body(PartUrlsCreate))],
) -> PartUrls:
    """URLs to PUT parts to, good for an hour; a part may be sent again."""
    return uploads.part_urls(services.db, services.store, upload_id, request)


@router.post(
    "/uploads/{upload_id}/complete",
    status_code=201,
    operation_id="complete_upload",
    responses={201: {"model": JobPublic}, **declares(401, 403, 404, 409, 413, 503)},
)
def complete_upload(services: ServicesDep, actor: Member, upload_id: UploadId) -> JobPublic:
    """All parts are there: queue the import job. Asked again, the same job."""
    return uploads.complete_upload(services.db, services.store, actor, upload_id)


@router.delete(
    "/uploads/{upload_id}",
    status_code=204,
    operation_id="abort_upload",
    responses=declares(401, 403, 404, 409, 503),
)
def abort_upload(services: ServicesDep, _: Member, upload_id: UploadId) -> None:
    """Give an upload up; its parts are deleted."""
    uploads.abort_upload(services.db, services.store, upload_id)


_IMAGE_BODY = {"schema": {"type": "string", "format": "binary"}}


@router.post(
    "/images",
    status_code=201,
    operation_id="upload_image",
    openapi_extra={
        "requestBody": {"required": True, "content": dict.fromkeys((*images.MEDIA_TYPES, "image/*"), _IMAGE_BODY)}
    },
    responses={201: {"model": ImagePublic}, **declares(401, 403, 413, 422, 503)},
)
def upload_image(services: ServicesDep, actor: Member, content: RawBody) -> ImagePublic:
    """Upload an image, the body as it is, to see what a checkpoint attends to in it: name its id in
    `data.source: {type: images, ids: […]}` of an inspect job."""
    return images.upload_image(services.db, services.store, services.settings, actor, content)
