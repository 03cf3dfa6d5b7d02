"""What happens to every request before a route sees it: a limit on the body, a log line, a safe content type; and a
measurement of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.services.images import MAX_IMAGE_BYTES
from orchestrator.services.problems import TooLarge, problem_response

log = structlog.get_logger(__name__)
MAX_BODY_BYTES = 1024 * 1024
# A driver that was cut off delivers a whole spool of points at once.
MAX_REPORT_BYTES = 8 * 1024 * 1024
INTERNAL_PREFIX = "/internal/"
IMAGE_PATHS = ("/v1/images", "/dashboard/files/images")
Observe = Callable[[str, str | None, int, float], None]


def body_limit(path: str) -> int:
    """The largest body accepted at `path`, in bytes."""
    if path.startswith(INTERNAL_PREFIX):
        return MAX_REPORT_BYTES
    return MAX_IMAGE_BYTES if path in IMAGE_PATHS else MAX_BODY_BYTES


class BodyLimit:
    """Refuses a body over the limit with 413, by its Content-Length or, where that is missing, while it streams in."""

    def __init__(self, app: ASGIApp, limit: Callable[[str], int] = body_limit) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limit(scope["path"])
        request = Request(scope)
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            await _too_large(request, limit)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise TooLarge(_detail(limit))
            return message

        await self.app(scope, counted, send)


def _detail(limit: int) -> str:
    return f"The body is larger than {limit} bytes; nothing was read into a job."


def _too_large(request: Request, limit: int) -> ASGIApp:
    # The connection is closed: the rest of the body is never read.
    return problem_response(request, TooLarge.status, TooLarge.code, _detail(limit), headers={"Connection": "close"})


class RequestLog:
    """One structured line per request, without query or headers: those may hold secrets. `observe` is told method,
    route (None: none matched), status and seconds to the first byte."""

    def __init__(self, app: ASGIApp, observe: Observe | None = None) -> None:
        self.app = app
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        status, answered = 500, None

        async def noted(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], time.monotonic()
                # User text must never be taken for HTML.
                message = {**message, "headers": [*message["headers"], (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            ended = time.monotonic()
            if self.observe is not None:
                # The router leaves the route in the scope it was given.
                route = getattr(scope.get("route"), "path", None)
                self.observe(scope["method"], route, status, (answered or ended) - started)
            milliseconds = round((ended - started) * 1000, 1)
            log.info("request", method=scope["method"], path=scope["path"], status=status, ms=milliseconds)
