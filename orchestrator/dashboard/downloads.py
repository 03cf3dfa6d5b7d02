"""Files that pages offer: a log as text, metrics as a table. Who may see the page may have them."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from pydantic import AwareDatetime

from orchestrator.dashboard.mount import Services
from orchestrator.services import checkpoints, metric_files, pictures
from orchestrator.services.logs import LEVELS, LogFilter, read_text
from orchestrator.services.patterns import check_pattern
from orchestrator.services.problems import ApiError
from orchestrator.storage.store import StoreError


def register(app: FastAPI, services: Services) -> None:
    """Add the routes, below /files."""

    def log(
        job_id: str,
        attempt: str = "",
        stream: str = "",
        level: str = "",
        q: str = "",
        regex: str = "",
        since: AwareDatetime | None = None,
        until: AwareDatetime | None = None,
    ) -> Response:
        number = int(attempt) if attempt.isdecimal() and len(attempt) < 5 else None
        known_level = level if level in LEVELS else None
        wanted = LogFilter(number, stream or None, known_level, q or None, regex or None, since, until)
        check_pattern(regex)
        return _file(
            read_text(services.db, services.store, job_id, wanted), "text/plain; charset=utf-8", f"{job_id}.log"
        )

    def metrics(job_id: str) -> Response:
        pieces = metric_files.metrics_file(services.db, job_id, [], "csv")
        return _file(pieces, metric_files.MEDIA_TYPES["csv"], f"{job_id}-metrics.csv")

    def picture(job_id: str, name: str) -> Response:
        file, chunks = pictures.picture_file(services.db, services.store, job_id, name)
        headers = {"Content-Length": str(file.num_bytes), "Cache-Control": "private, max-age=3600"}
        return StreamingResponse(chunks, headers=headers, media_type=pictures.media_type(name))

    def export(job_id: str, fmt: str, name: str) -> Response:
        file = checkpoints.export_file(services.db, services.store, job_id, fmt, name)
        chunks = checkpoints.stream_file(services.store, file, None)
        found = _file(chunks, "application/octet-stream", file.name.rpartition("/")[2])
        found.headers["Content-Length"] = str(file.size)
        return found

    app.add_api_route("/files/jobs/{job_id}/exports/{fmt}/{name:path}", export, include_in_schema=False)
    app.add_api_route("/files/jobs/{job_id}/pictures/{name}", picture, include_in_schema=False)
    app.add_api_route("/files/jobs/{job_id}/log", log, include_in_schema=False)
    app.add_api_route("/files/jobs/{job_id}/metrics.csv", metrics, include_in_schema=False)

    @app.exception_handler(ApiError)
    async def refused(_: object, error: ApiError) -> Response:
        return PlainTextResponse(error.detail, error.status)

    @app.exception_handler(StoreError)
    async def away(_: object, __: StoreError) -> Response:
        return PlainTextResponse("The object store cannot be reached at the moment. Try again.", 503)


def _file(pieces: Iterator[str] | Iterator[bytes], media_type: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return StreamingResponse(pieces, media_type=media_type, headers=headers)
