"""Pictures of what a checkpoint has learned, and the numbers behind them: what inspect jobs leave."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import Response, StreamingResponse

from orchestrator.api.deps import JobId, ServicesDep, Viewer
from orchestrator.schemas import PicturePage
from orchestrator.services import pictures
from orchestrator.services.problems import declares

router = APIRouter(prefix="/v1/jobs/{job_id}/pictures", tags=["pictures"])
PictureName = Annotated[
    str, Path(description="A file of the list: a PNG, or its arrays.", examples=["attention_distance.png"])
]
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A PNG, or (.npz) arrays by name for numpy.load.",
        "content": dict.fromkeys(pictures.MEDIA_TYPES.values(), _BINARY),
    },
    **declares(401, 404, 503),
}


@router.get("", operation_id="list_pictures", responses=declares(401, 404, 503))
def list_pictures(services: ServicesDep, _: Viewer, job_id: JobId) -> PicturePage:
    """What an inspect job drew, with captions; nothing while it has not succeeded."""
    return pictures.list_pictures(services.db, services.store, job_id)


@router.get("/{name}", operation_id="get_picture", response_class=Response, responses=_FILE)
def get_picture(services: ServicesDep, _: Viewer, job_id: JobId, name: PictureName) -> Response:
    """A picture, or the numbers behind it."""
    file, chunks = pictures.picture_file(services.db, services.store, job_id, name)
    headers = {"Content-Length": str(file.num_bytes), "Cache-Control": "private, max-age=3600"}
    return StreamingResponse(chunks, headers=headers, media_type=pictures.media_type(file.name))
