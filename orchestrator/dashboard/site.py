"""NiceGUI with our pages. Loaded by the first visit, in a thread: nothing here may touch the event loop."""

from __future__ import annotations

import hashlib

from fastapi import FastAPI
from nicegui import app, ui

from orchestrator.dashboard import downloads, drop, mount, parts
from orchestrator.dashboard.access import PATH, Access
from orchestrator.dashboard.frame import Frame, Site, url
from orchestrator.dashboard.pages import compare, job, jobs, overview, submit, tokens

# A light page until its script runs would flash in the dark.
_BEFORE_SCRIPTS = """
<meta name="color-scheme" content="light dark">
<link rel="icon" href="{path}/static/patchwork.svg">
<link rel="stylesheet" href="{path}/static/patchwork.css?v={digest}">
<script src="{path}/static/plots.js?v={digest}"></script>
<script src="{path}/static/patchwork.js?v={digest}"></script>
"""


def build(services: mount.Services, access: Access) -> FastAPI:
    """An application that serves the pages at its root; its lifespan must be entered before the first request."""
    site = Site(services, access)
    ui.add_head_html(_BEFORE_SCRIPTS.format(path=PATH, digest=_digest()), shared=True)
    for page in (overview, jobs, job, submit, compare, tokens):
        page.register(site)
    downloads.register(app, services)
    drop.register(app, services)
    shell = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    ui.run_with(
        shell,
        root=lambda: _not_found(site),
        title="Patchwork",
        language="en-US",
        # Nobody's screen needs bindings; what changes is pushed.
        binding_refresh_interval=None,
        reconnect_timeout=10.0,
        gzip_middleware_factory=None,
        tailwind=False,
        show_welcome_message=False,
        favicon=mount.STATIC / "patchwork.svg",
    )
    return shell


def _not_found(site: Site) -> None:
    ui.context.client.status_code = 404
    request = ui.context.client.request
    with Frame(site, request, "Not found"), parts.empty("There is no such page."):
        parts.link("Go to the overview", url("/overview"))


def _digest() -> str:
    digest = hashlib.sha256()
    for file in sorted(mount.STATIC.iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
