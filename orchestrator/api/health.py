"""For probes: alive, and ready, without a token; and for Prometheus, with one."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from orchestrator.api.deps import Viewer
from orchestrator.schemas import Health, Readiness
from orchestrator.services.exposition import CONTENT_TYPE, Exposition
from orchestrator.services.health import ReadinessProbe
from orchestrator.services.problems import declares

router = APIRouter(tags=["health"])


@router.get("/healthz", operation_id="healthz")
async def healthz(request: Request) -> Health:
    """The process answers."""
    return Health(version=request.app.version)


@router.get(
    "/readyz", operation_id="readyz", responses={503: {"model": Readiness, "description": "A required part is away."}}
)
def readyz(request: Request, response: Response) -> Readiness:
    """Whether this API can take requests: 503 where the database or the store, which it needs, is away. Without a
    controller or Ray it works, and jobs wait: these checks are shown, and are not `required`."""
    probe: ReadinessProbe = request.app.state.readiness
    readiness = probe.look()
    if not readiness.ready:
        response.status_code = 503
    return readiness


@router.get(
    "/metrics",
    operation_id="scrape",
    response_class=Response,
    responses={
        200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **declares(401, 503),
    },
)
def scrape(request: Request, _: Viewer) -> Response:
    """For Prometheus: jobs by state, the queue, attempts, work lost, the cluster; and the latency of this process's
    requests."""
    exposition: Exposition = request.app.state.exposition
    return Response(exposition.text(), headers={"Content-Type": CONTENT_TYPE})
