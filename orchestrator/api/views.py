"""Many jobs at once: the service at a glance, and jobs side by side."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from orchestrator.api.deps import JobId, PrintableText, ServicesDep, Viewer
from orchestrator.services import compare, lineage, overview
from orchestrator.services.problems import declares
from orchestrator.view_schemas import ComparisonPublic, LineagePublic, OverviewPublic

router = APIRouter(prefix="/v1", tags=["views"])


@router.get("/overview", operation_id="get_overview", responses=declares(401, 503))
def get_overview(services: ServicesDep, _: Viewer) -> OverviewPublic:
    """The cluster, what runs on it, who waits, what failed lately, and what is kept."""
    return overview.read_overview(services.db)


@router.get("/jobs/{job_id}/lineage", operation_id="get_lineage", responses=declares(401, 404, 503))
def get_lineage(services: ServicesDep, _: Viewer, job_id: JobId) -> LineagePublic:
    """What the job came of and what came of it: retries, forks, weights; at most a hundred jobs."""
    return lineage.read_lineage(services.db, job_id)


@router.get("/compare", operation_id="compare_jobs", responses=declares(401, 404, 422, 503))
def compare_jobs(
    services: ServicesDep,
    _: Viewer,
    job: Annotated[list[PrintableText], Query(min_length=1, description="job_…; up to 20.")],
    name: Annotated[list[PrintableText] | None, Query(description="Metrics to read; left out: none.")] = None,
    max_points: Annotated[int, Query(ge=1, le=2000, description="For each curve.")] = 500,
) -> ComparisonPublic:
    """Curves of several jobs, by step and by time, and the fields in which their descriptions differ."""
    return compare.compare_jobs(services.db, job, name or [], max_points)
