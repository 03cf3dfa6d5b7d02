"""What the API mounts at /dashboard: who may enter, with which headers, and the pages behind.

NiceGUI is loaded with the first visit: an API that nobody looks at starts as fast and stays as small as without it.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from orchestrator.dashboard import login
from orchestrator.dashboard.access import PATH, Access, is_same_origin
from orchestrator.services.auth import Actor
from orchestrator.services.problems import Unauthorized
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.store import ObjectStore

if TYPE_CHECKING:
    from fastapi import FastAPI

STATIC = Path(__file__).parent / "static"
# NiceGUI compiles its components' templates in the browser, which takes 'unsafe-eval'; Vue, Quasar and ECharts set
# styles on elements, which takes 'unsafe-inline' for styles. Scripts of a page run by nonce only: an injected one has
# none. Fonts and pictures may be written into a style sheet (data:). Nothing is loaded from another host.
_POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src 'self'; form-action 'self'; "
    "base-uri 'none'; object-src 'none'; frame-ancestors 'none'"
)
_SCRIPT = re.compile(rb"<script(?=[\s>])")


@dataclass(frozen=True)
class Services:
    """What the pages work with."""

    settings: Settings
    db: Database
    store: ObjectStore


class Dashboard:
    """The dashboard as an ASGI application, to be mounted at `PATH`. Call `close` when the server stops."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.access = Access(services.db, services.settings)
        self._static = StaticFiles(directory=STATIC)
        self._pages: ASGIApp | None = None
        self._loading = asyncio.Lock()
        self._open = AsyncExitStack()
        self._answer = GZipMiddleware(self._route, minimum_size=500, compresslevel=5)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            await self._answer(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A copy: the router in front names routes by what it finds in its own scope.
        scope = {**scope, "state": dict(scope.get("state", {})), "headers": _without_prefix(scope["headers"])}
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        elif path.startswith("/static/"):
            inner = {**scope, "root_path": scope.get("root_path", "") + "/static"}
            await self._static(inner, receive, _with_headers(send, _ASSET))
        elif path.startswith("/_nicegui/"):
            # Its paths name NiceGUI's version; of components only those of NiceGUI itself keep with that.
            is_ours = "/components/" in path or "/dynamic_resources/" in path
            headers = {"Cache-Control": "no-cache"} if is_ours else _ASSET
            await (await self.pages())(scope, receive, _with_headers(send, headers))
        else:
            await self._page(path, scope, receive, send)

    async def pages(self) -> ASGIApp:
        """NiceGUI with our pages, loaded by the first who asks."""
        async with self._loading:
            if self._pages is None:
                loop = asyncio.get_running_loop()
                shell: FastAPI = await loop.run_in_executor(None, _load, self.services, self.access)
                await self._open.enter_async_context(shell.router.lifespan_context(shell))
                self._pages = shell
            return self._pages

    async def close(self) -> None:
        """Let go of the pages that are open."""
        await self._open.aclose()

    async def _page(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        nonce = secrets.token_urlsafe(16)
        send = _with_headers(send, _page_headers(nonce))
        request = Request(scope, receive)
        if path == "/login":
            await (await login.answer(request, self.access))(scope, receive, send)
            return
        if path == "/logout":
            await login.leave(request)(scope, receive, send)
            return
        try:
            actor = await self.access.actor(request)
        except Unauthorized:
            await _to_login(request, path)(scope, receive, send)
            return
        if path == "/":
            await RedirectResponse(f"{PATH}/overview", 307)(scope, receive, send)
            return
        _enter(scope, actor, nonce)
        await (await self.pages())(scope, receive, _Nonces(send, nonce))

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = HTTPConnection(scope)
        try:
            if not is_same_origin(connection):
                raise Unauthorized("This page is not ours.")
            _enter(scope, await self.access.actor(connection), "")
        except Unauthorized:
            await WebSocketClose(code=4401)(scope, receive, send)
            return
        await (await self.pages())(scope, receive, send)


def _load(services: Services, access: Access) -> FastAPI:
    from orchestrator.dashboard.site import build

    return build(services, access)


def _enter(scope: Scope, actor: Actor, nonce: str) -> None:
    scope["state"] |= {"actor": actor, "nonce": nonce}


def _to_login(request: Request, path: str) -> Response:
    if request.method != "GET":
        return PlainTextResponse("Log in first.", 401)
    wanted = path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"{PATH}/login?next={quote(wanted, safe='')}", 303)


def _without_prefix(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """NiceGUI writes X-Forwarded-Prefix into its pages; a client has no say in that."""
    return [(name, value) for name, value in headers if name != b"x-forwarded-prefix"]


# Asked for by the digest of the file, or by NiceGUI's version.
_ASSET = {"Cache-Control": "public, max-age=31536000, immutable"}


def _page_headers(nonce: str) -> dict[str, str]:
    return {
        "Content-Security-Policy": _POLICY.format(nonce=nonce),
        "Referrer-Policy": "same-origin",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    }


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            found = MutableHeaders(raw=list(message["headers"]))
            for name, value in headers.items():
                found.setdefault(name, value)
            message = {**message, "headers": found.raw}
        await send(message)

    return sending


class _Nonces:
    """Gives the scripts that NiceGUI writes into a page the page's nonce. What users wrote is escaped before it gets
    there: it holds no `<`."""

    def __init__(self, send: Send, nonce: str) -> None:
        self._send = send
        self._attribute = b'<script nonce="' + nonce.encode() + b'"'
        self._start: Message | None = None
        self._body: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            if headers.get("content-type", "").startswith("text/html") and "content-encoding" not in headers:
                self._start = message
                return
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body.append(message.get("body", b""))
            if not message.get("more_body", False):
                await self._finish(self._start)
            return
        await self._send(message)

    async def _finish(self, start: Message) -> None:
        body = _SCRIPT.sub(self._attribute, b"".join(self._body))
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["content-length"] = str(len(body))
        self._start = None
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})
