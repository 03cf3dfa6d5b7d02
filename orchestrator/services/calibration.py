"""What finished jobs teach plans: the newest of them, as `configs.calibration` takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from configs.calibration import Calibration, MeasuredRun
from configs.cost import GPUS
from configs.states import JobState
from orchestrator.storage.tables import AttemptRow, ClusterRow, JobRow

MAX_JOBS = 200
"""The newest say more of the cluster as it is now."""
MIN_STEPS, MIN_SECONDS = 20, 5.0
"""Shorter runs say how long a start takes."""


def calibrate(session: Session) -> Calibration:
    """The calibration by the newest finished training jobs."""
    finished = (
        select(JobRow)
        .where(JobRow.state == JobState.SUCCEEDED, JobRow.kind.in_(("pretrain", "finetune")))
        .order_by(JobRow.created_at.desc())
        .limit(MAX_JOBS)
    )
    jobs = {row.id: row for row in session.scalars(finished)}
    attempts: dict[str, AttemptRow] = {}
    for attempt in session.scalars(select(AttemptRow).where(AttemptRow.job_id.in_(jobs)).order_by(AttemptRow.number)):
        attempts[attempt.job_id] = attempt
    gpus = gpus_of_nodes(session)
    runs = [measured_run(job, attempts[job_id], gpus) for job_id, job in jobs.items() if job_id in attempts]
    return Calibration(run for run in runs if run is not None)


def gpus_of_nodes(session: Session) -> dict[str, str]:
    """Which GPU each node of the cluster has, by the node's name, as far as it has one that we know."""
    clusters = session.scalars(select(ClusterRow))
    nodes = [node for cluster in clusters for node in cluster.nodes if node.get("accelerator") in GPUS]
    return {node["host"]: node["accelerator"] for node in nodes}


def measured_run(job: JobRow, attempt: AttemptRow, gpus: Mapping[str, str]) -> MeasuredRun | None:
    """What the job's last attempt measured; None if it was too short, or it is not known what it ran on.

    Args:
        gpus: of the cluster's nodes, for jobs that take any.
    """
    spec, plan = json.loads(job.spec_json), job.plan
    resources = spec["resources"]
    on_gpu = resources["gpus_per_worker"] > 0
    accelerator = (plan.get("accelerator") or _only_gpu(attempt, gpus)) if on_gpu else None
    if on_gpu and accelerator is None:
        return None
    seconds, steps = 0.0, attempt.to_step - attempt.from_step - 1
    if attempt.first_step_at is not None and attempt.last_progress_at is not None:
        # The step that set first_step_at was done before the clock started.
        seconds = (attempt.last_progress_at - attempt.first_step_at).total_seconds()
    if steps < MIN_STEPS or seconds < MIN_SECONDS or plan.get("macs") is None:
        return None
    peaks = [value for name, value in job.last_metrics.items() if name.startswith("perf/peak_memory_gib/") and value]
    return MeasuredRun(
        job_id=job.id,
        accelerator=accelerator,
        precision=spec["train"]["precision"],
        macs=plan["macs"],
        checkpointing=spec["train"]["activation_checkpointing"],
        cpus_per_worker=resources["cpus_per_worker"],
        world_size=attempt.world_size,
        images_per_s=steps * spec["train"]["global_batch_size"] / seconds,
        data_wait=job.last_metrics.get("perf/data_wait"),
        peak_gib=max(peaks, default=None),
        planned_gib=_planned_gib(plan, attempt.world_size) if on_gpu else None,
    )


def _only_gpu(attempt: AttemptRow, gpus: Mapping[str, str]) -> str | None:
    """What all of the attempt's nodes have; None if they differ or it is not known of one."""
    found = {gpus.get(str(node)) for node in attempt.nodes}
    return found.pop() if len(found) == 1 else None


def _planned_gib(plan: dict[str, Any], world_size: int) -> float | None:
    """Of one rank, as the job was planned; None if it ran on another number of workers than it was planned for."""
    if plan.get("world_size") != world_size:
        return None
    stage = next((stage for stage in plan.get("stages", ()) if stage["stage"] == plan.get("zero_stage")), None)
    return None if stage is None else stage["total_gib"]
