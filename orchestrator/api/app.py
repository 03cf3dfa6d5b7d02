"""The API: `create_app` puts routes, services and error handlers together."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from configs.search_wire import TrialCreate, TrialEnd
from configs.wire import ClaimRequest, ReportBatch
from orchestrator.api import (
    catalog,
    checkpoints,
    health,
    internal,
    jobs,
    pictures,
    searches,
    telemetry,
    tokens,
    uploads,
    views,
    vtab,
)
from orchestrator.api.deps import Services
from orchestrator.api.middleware import BodyLimit, RequestLog
from orchestrator.dashboard.access import PATH as DASHBOARD
from orchestrator.dashboard.mount import Dashboard
from orchestrator.schemas import (
    CheckpointEdit,
    DatasetCreate,
    ImportCreate,
    JobCreate,
    JobEdit,
    JobFork,
    PartUrlsCreate,
    PlanCreate,
    Problem,
    TokenCreate,
)
from orchestrator.search_schemas import SlotsSet, TrialsAdd
from orchestrator.services.exposition import Exposition
from orchestrator.services.health import ReadinessProbe
from orchestrator.services.problems import PROBLEM_JSON, install_handlers
from orchestrator.services.streams import StreamLimit
from orchestrator.settings import Settings
from orchestrator.storage.db import Database
from orchestrator.storage.store import ObjectStore
from orchestrator.vtab_schemas import VtabCreate

DESCRIPTION = """Trains Vision Transformers on a shared cluster: plan, queue, train, resume, fetch.

Errors are `application/problem+json`; `errors[].pointer` names each field that is wrong. Lists are paged by opaque
cursors; streams are server-sent events that go on after `Last-Event-ID`; `POST /v1/jobs` takes an `Idempotency-Key`.
"""
_MODULES = (
    jobs,
    views,
    searches,
    telemetry,
    checkpoints,
    pictures,
    uploads,
    vtab,
    catalog,
    tokens,
    health,
    internal,
)
# Bodies that routes read themselves, and answers declared by reference.
_REFERENCED: tuple[type[BaseModel], ...] = (
    Problem,
    JobCreate,
    CheckpointEdit,
    JobEdit,
    JobFork,
    PlanCreate,
    DatasetCreate,
    ImportCreate,
    PartUrlsCreate,
    TokenCreate,
    ClaimRequest,
    ReportBatch,
    VtabCreate,
    TrialCreate,
    TrialEnd,
    TrialsAdd,
    SlotsSet,
)


def create_app(settings: Settings, db: Database, store: ObjectStore, dashboard: Dashboard | None = None) -> FastAPI:
    """The API on these services, and the dashboard beside it. The database's schema must be there already."""
    app = FastAPI(
        title="Patchwork",
        version=_version(),
        description=DESCRIPTION,
        lifespan=_lifespan,
        # Their pages load scripts from elsewhere; /openapi.json is the document.
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = Services(settings, db, store, StreamLimit())
    app.state.readiness = ReadinessProbe(settings, db, store)
    app.state.exposition = exposition = Exposition(db, os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
    for module in _MODULES:
        app.include_router(module.router)
    app.state.dashboard = dashboard
    if dashboard is not None:
        app.mount(DASHBOARD, dashboard)
        app.add_api_route("/", _to_dashboard, include_in_schema=False)
    install_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestLog, observe=exposition.observe)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    services: Services = app.state.services
    services.streams.close()
    if app.state.dashboard is not None:
        await app.state.dashboard.close()
    services.db.close()


async def _to_dashboard() -> Response:
    return RedirectResponse(DASHBOARD)


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=_tags()
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(_schemas_of(_REFERENCED))
        _drop_foreign_problems(document)
        app.openapi_schema = document
    return app.openapi_schema


def _drop_foreign_problems(document: dict[str, Any]) -> None:
    """FastAPI declares its own form of 422 for every route with a parameter; none answers with it."""
    for item in document["paths"].values():
        for operation in item.values():
            content = operation["responses"].get("422", {}).get("content", {})
            if PROBLEM_JSON not in content:
                operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def _schemas_of(models: Iterable[type[BaseModel]]) -> dict[str, Any]:
    _, document = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    found: dict[str, Any] = document["$defs"]
    return found


def _tags() -> list[dict[str, str]]:
    tags = [{"name": str(m.router.tags[0]), "description": (m.__doc__ or "").strip()} for m in _MODULES]
    return [*tags, {"name": "exports", "description": "What export and evaluate jobs leave."}]


def _version() -> str:
    try:
        return version("patchwork-vit")
    except PackageNotFoundError:
        return "0+unknown"
