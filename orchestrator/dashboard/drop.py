"""Images that somebody drops on a page: the place for them, and where they are sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from nicegui.element import Element
from nicegui.events import GenericEventArguments

from configs.data import MAX_UPLOADED_IMAGES
from orchestrator.dashboard.access import PATH, is_same_origin
from orchestrator.dashboard.mount import Services
from orchestrator.services.auth import require
from orchestrator.services.images import MAX_IMAGE_BYTES, upload_image

_ROUTE = "/files/images"
_AT_ONCE = 4


class Drop(Element, component="components/drop.js"):
    """Takes image files; `on_sent` hears the ids of those that have arrived."""

    def __init__(self, hint: str, on_sent: Callable[[list[str]], Any]) -> None:
        super().__init__()
        self.props["to"] = PATH + _ROUTE
        self.props["hint"] = hint
        self.props["most"] = MAX_UPLOADED_IMAGES
        self.props["most-bytes"] = MAX_IMAGE_BYTES

        def sent(event: GenericEventArguments) -> Any:
            # From a browser: whatever it is, submitting the job checks it.
            found = event.args if isinstance(event.args, list) else []
            return on_sent([str(one) for one in found])

        self.on("sent", sent)


def register(app: FastAPI, services: Services) -> None:
    """Add the route."""
    few = asyncio.Semaphore(_AT_ONCE)

    async def take(request: Request) -> Response:
        # A cookie goes with requests that other sites make, too.
        if not is_same_origin(request):
            return PlainTextResponse("This page is not ours.", 403)
        actor = require(request.scope["state"]["actor"], "member")
        # A few at a time: each is held in memory, and waits for the store on a thread.
        async with few:
            content = await request.body()
            made = await run_in_threadpool(upload_image, services.db, services.store, services.settings, actor, content)
        return JSONResponse(made.model_dump(mode="json"), 201)

    app.add_api_route(_ROUTE, take, methods=["POST"], include_in_schema=False)
