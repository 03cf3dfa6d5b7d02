"""What a job did and does: attempts, events, metrics, logs; as pages, and as streams to follow."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import AwareDatetime

from orchestrator.api.deps import JobId, PrintableText, Services, ServicesDep, Viewer
from orchestrator.schemas import AttemptPublic, EventFilePage, EventPage, JobCard, LogPage, MetricsPublic
from orchestrator.services import cards, event_files, history, logs, metric_files, metrics
from orchestrator.services.auth import Actor, authenticate, require
from orchestrator.services.patterns import check_pattern
from orchestrator.services.problems import Invalid, declares, field_error
from orchestrator.services.streams import EventStream

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["telemetry"])
EVENT_POLL_S = 0.5
LOG_POLL_S = 1.0
DEFAULT_POINTS = 2000
# Before OpenAPI 3.2 the schema of a stream is by convention that of each of its events.
_EVENT_STREAM: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {
                "id": {"type": "string", "description": "Where to go on, as Last-Event-ID."},
                "event": {"type": "string"},
                "data": {"type": "string", "description": "JSON."},
            },
            "required": ["event", "data"],
        }
    }
}
_SSE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events; `end` is the last one. Reconnect with Last-Event-ID to go on.",
        "content": _EVENT_STREAM,
    }
}
MAX_PLACE = 16_000
"""Of a place in a log; percent-encoded it must fit into what the server takes as a head, 64 KiB."""
LastEventId = Annotated[str | None, Header(max_length=MAX_PLACE, description="Where a broken stream goes on.")]
Level = Literal["debug", "info", "warning", "error"]


@router.get("/attempts", operation_id="list_attempts", responses=declares(401, 404, 503))
def list_attempts(services: ServicesDep, _: Viewer, job_id: JobId) -> tuple[AttemptPublic, ...]:
    """The job's attempts, by number."""
    return history.list_attempts(services.db, job_id)


@router.get("/events", operation_id="list_events", responses=declares(401, 404, 422, 503))
def list_events(
    services: ServicesDep,
    _: Viewer,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, lt=2**63, description="Only events with a larger seq.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> EventPage:
    """What happened to the job, the oldest first."""
    return history.list_events(services.db, job_id, after, limit)


@router.get("/events/stream", operation_id="stream_events", responses={**_SSE, **declares(401, 404, 422, 429, 503)})
def stream_events(
    request: Request,
    services: ServicesDep,
    actor: Viewer,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    last_event_id: LastEventId = None,
) -> Response:
    """The job's events as they happen, each with its seq as id, until the job has ended."""
    start = int(last_event_id) if last_event_id and last_event_id.isdecimal() and len(last_event_id) < 19 else after
    history.list_events(services.db, job_id, start, 1)
    follower = history.EventFollower(services.db, job_id, start)
    return EventStream(services.streams, actor, follower.poll, _recheck(request, services), interval_s=EVENT_POLL_S)


@router.get(
    "/metrics",
    operation_id="read_metrics",
    response_model=MetricsPublic,
    responses={
        200: {
            "description": "The curves; with format=csv or format=parquet every point, as a file.",
            "content": {
                "text/csv": {"schema": {"type": "string"}},
                "application/vnd.apache.parquet": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        **declares(401, 404, 406, 422, 503),
    },
)
def read_metrics(
    services: ServicesDep,
    _: Viewer,
    job_id: JobId,
    names: Annotated[PrintableText | None, Query(description="Comma-separated; left out: all.")] = None,
    max_points: Annotated[
        int | None, Query(ge=1, le=10_000, description="For each metric (2000). Not for files: they are never joined.")
    ] = None,
    format: Annotated[Literal["json", "csv", "parquet"], Query(description="csv, parquet: every point.")] = "json",
) -> Any:
    """The job's metrics, cut at every resume and joined into at most max_points equal ranges of steps: mean, lowest
    and highest of each. As a file: every point."""
    wanted = [name for name in (names or "").split(",") if name]
    if format == "json":
        return metrics.read_metrics(services.db, job_id, wanted, max_points or DEFAULT_POINTS)
    if max_points is not None:
        errors = [field_error("/max_points", f"does not apply with format={format}", max_points)]
        raise Invalid(f"max_points does not apply with format={format}: a file holds every point.", errors=errors)
    headers = {"Content-Disposition": f'attachment; filename="{job_id}-metrics.{format}"'}
    pieces = metric_files.metrics_file(services.db, job_id, wanted, format)
    return StreamingResponse(pieces, media_type=metric_files.MEDIA_TYPES[format], headers=headers)


@router.get("/tensorboard", operation_id="list_event_files", responses=declares(401, 404, 503))
def list_event_files(services: ServicesDep, _: Viewer, job_id: JobId) -> EventFilePage:
    """The job's event files for TensorBoard, in the order in which it reads them."""
    return event_files.list_event_files(services.db, services.store, job_id)


@router.get(
    "/tensorboard/{name}",
    operation_id="get_event_file",
    response_class=Response,
    responses={
        200: {
            "description": "The file as it is now.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        },
        **declares(401, 404, 503),
    },
)
def get_event_file(services: ServicesDep, _: Viewer, job_id: JobId, name: str) -> Response:
    """An event file."""
    num_bytes, chunks = event_files.event_file(services.db, services.store, job_id, name)
    headers = {"Content-Length": str(num_bytes)}
    return StreamingResponse(chunks, headers=headers, media_type="application/octet-stream")


@router.get("/card", operation_id="get_card", responses=declares(401, 404, 503))
def get_card(services: ServicesDep, _: Viewer, job_id: JobId) -> JobCard:
    """The run on one page: description, versions, data, seeds, curves, evaluations, cost, how to reproduce it."""
    return cards.make_card(services.db, services.store, job_id)


@router.get(
    "/logs",
    operation_id="read_logs",
    response_model=LogPage,
    responses={
        200: {
            "description": "A page; with follow=true server-sent events; with format=text the whole log.",
            "content": {**_EVENT_STREAM, "text/plain": {"schema": {"type": "string"}}},
        },
        **declares(401, 404, 422, 429, 503),
    },
)
def read_logs(
    request: Request,
    services: ServicesDep,
    actor: Viewer,
    job_id: JobId,
    attempt: Annotated[int | None, Query(ge=1, le=9999)] = None,
    stream: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_.-]{1,64}$", examples=["driver", "rank-00000"])] = None,
    level: Annotated[Level | None, Query(description="This level and those above it.")] = None,
    q: Annotated[PrintableText | None, Query(description="A part of the message, in any case.")] = None,
    regex: Annotated[
        PrintableText | None, Query(description="A regular expression found in the message, in any case.")
    ] = None,
    since: Annotated[AwareDatetime | None, Query(description="Only lines from this time on.")] = None,
    until: Annotated[AwareDatetime | None, Query(description="Only lines before this time.")] = None,
    tail: Annotated[int | None, Query(ge=1, le=logs.MAX_TAIL, description="Begin with the last so many lines.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    cursor: Annotated[str | None, Query(max_length=MAX_PLACE, description="Where to go on.")] = None,
    follow: Annotated[bool, Query(description="Stream lines as they arrive, until the job has ended.")] = False,
    format: Annotated[Literal["json", "text"], Query(description="text: the whole log as a file.")] = "json",
    last_event_id: LastEventId = None,
) -> Any:
    """Lines of all streams, merged by time within each attempt."""
    if regex is not None:
        check_pattern(regex)
    wanted = logs.LogFilter(attempt, stream, level, q, regex, since, until)
    if follow:
        start = last_event_id or cursor
        reader = logs.LogReader(services.db, services.store, job_id, wanted, logs.parse_cursor(start))
        reader.check()
        follower = logs.LogFollower(reader, None if start else tail)
        return EventStream(services.streams, actor, follower.poll, _recheck(request, services), interval_s=LOG_POLL_S)
    if format == "text":
        text = logs.read_text(services.db, services.store, job_id, wanted)
        headers = {"Content-Disposition": f'attachment; filename="{job_id}.log"'}
        return StreamingResponse(text, media_type="text/plain; charset=utf-8", headers=headers)
    return logs.read_page(services.db, services.store, job_id, wanted, limit, cursor, tail)


def _recheck(request: Request, services: Services) -> Callable[[], Actor]:
    """Looks again whether the token that opened a stream is still good."""
    authorization = request.headers.get("authorization")

    def check() -> Actor:
        with services.db.reader() as session:
            return require(authenticate(session, authorization, datetime.now(UTC)), "viewer")

    return check
