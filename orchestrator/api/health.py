"""For probes: alive, and ready. Neither needs a token."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from orchestrator.schemas import Health, Readiness
from orchestrator.services.health import ReadinessProbe

router = APIRouter(tags=["health"])


@router.get("/healthz", operation_id="healthz")
async def healthz(request: Request) -> Health:
    """The process answers."""
    return Health(version=request.app.version)


@router.get(
    "/readyz", operation_id="readyz", responses={503: {"model": Readiness, "description": "A required part is away."}}
)
def readyz(request: Request, response: Response) -> Readiness:
    """Every part the service needs. Without a controller or Ray the API works, and jobs wait."""
    probe: ReadinessProbe = request.app.state.readiness
    readiness = probe.look()
    if not readiness.ready:
        response.status_code = 503
    return readiness
