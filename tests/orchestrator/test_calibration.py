"""Plans learn from the jobs that have finished."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

from configs.ids import attempt_id
from configs.states import AttemptState, JobState
from orchestrator.services.calibration import calibrate
from orchestrator.storage.db import Database
from orchestrator.storage.tables import AttemptRow, ClusterRow, JobRow
from tests.orchestrator.rows import T0, add_attempt, move, spec_with, submit


def finish(api: TestClient, db: Database, *, steps: int = 101, seconds: float = 50.0, **changes: Any) -> str:
    """A job that has trained so many steps, the first at T0, the last so many seconds later."""
    job_id: str = submit(api, **changes)["id"]
    add_attempt(
        db,
        job_id,
        state=AttemptState.ENDED,
        to_step=steps,
        first_step_at=T0,
        last_progress_at=T0 + timedelta(seconds=seconds),
    )
    move(db, job_id, JobState.PREPARING, JobState.RUNNING, JobState.SUCCEEDED)
    return job_id


def plan(api: TestClient, **changes: Any) -> dict[str, Any]:
    response = api.post("/v1/plans", json={"spec": spec_with(**changes)})
    assert response.status_code == 200, response.text
    made: dict[str, Any] = response.json()
    return made


@pytest.mark.db
def test_a_plan_takes_its_rate_from_finished_jobs(api: TestClient, db: Database) -> None:
    before = plan(api)
    assert (before["images_per_s"], before["measured_jobs"]) == (None, 0)
    finish(api, db)
    after = plan(api)
    # 100 steps after the first, in 50 seconds.
    assert after["images_per_s"] == pytest.approx(after["global_batch_size"] * 2)
    assert (after["measured_jobs"], after["error_band_pct"]) == (1, 15)
    assert "1 finished job with this model" in " ".join(after["notes"])


def test_what_a_run_is_taken_for(api: TestClient, db: Database) -> None:
    job_id = finish(api, db)
    with db.session() as session:
        session.get_one(JobRow, job_id).last_metrics = {"perf/data_wait": 0.25, "perf/peak_memory_gib/rank-00000": 3.0}
    with db.reader() as session:
        (run,) = calibrate(session).runs
    assert (run.job_id, run.accelerator, run.world_size, run.cpus_per_worker) == (job_id, None, 2, 1)
    assert (run.data_wait, run.peak_gib, run.planned_gib) == (0.25, 3.0, None)
    assert run.macs == plan(api)["macs"]


def test_gpus_are_told_by_the_accelerator_that_the_job_asked_for(api: TestClient, db: Database) -> None:
    named = {"workers": 2, "gpus_per_worker": 1, "accelerator": "A100"}
    job_id = finish(api, db, resources=named)
    finish(api, db, resources={"workers": 2, "gpus_per_worker": 1})
    with db.session() as session:
        job = session.get_one(JobRow, job_id)
        job.last_metrics = {f"perf/peak_memory_gib/rank-0000{rank}": 2.0 + rank for rank in range(2)}
        stage = job.plan["stages"][job.plan["zero_stage"]]
    with db.reader() as session:
        (run,) = calibrate(session).runs
    assert (run.job_id, run.accelerator, run.peak_gib, run.planned_gib) == (job_id, "A100", 3.0, stage["total_gib"])


def test_gpus_of_a_job_that_takes_any_are_told_by_its_nodes(api: TestClient, db: Database) -> None:
    of_nodes = {"gpu-1": "H100", "gpu-2": "H100", "gpu-3": "A100", "cpu-1": None}
    with db.session() as session:
        nodes = [
            {"id": f"id-{host}", "host": host, "alive": True, "accelerator": gpu} for host, gpu in of_nodes.items()
        ]
        session.add(ClusterRow(id=1, reachable=True, nodes=nodes, seen_at=T0))
    for names in (["gpu-1", "gpu-2"], ["gpu-1", "gpu-3"], ["gpu-1", "gone"], ["cpu-1"], []):
        job_id = finish(api, db, resources={"workers": 2, "gpus_per_worker": 1})
        with db.session() as session:
            session.get_one(AttemptRow, attempt_id(job_id, 1)).nodes = names
    with db.reader() as session:
        assert [run.accelerator for run in calibrate(session).runs] == ["H100"]


def test_short_failed_and_unfinished_jobs_teach_nothing(api: TestClient, db: Database) -> None:
    finish(api, db, steps=20)
    finish(api, db, seconds=4.9)
    failed = submit(api)["id"]
    add_attempt(db, failed, to_step=101, first_step_at=T0, last_progress_at=T0 + timedelta(seconds=50))
    move(db, failed, JobState.PREPARING, JobState.RUNNING, JobState.FAILED)
    with db.reader() as session:
        assert calibrate(session).runs == ()
