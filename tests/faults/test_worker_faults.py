"""Workers that die, freeze or fail at chosen places (rows 2, 4, 5, 41, 43 of docs/faults.md)."""

from __future__ import annotations

import pytest

from tests.faults.conftest import STALE_LOCK
from tests.faults.scene import EVERY, Scene, assert_exact, assert_nothing_left, reasons
from tests.stack.jobs import finished

pytestmark = pytest.mark.stack


def test_row_2_killed_right_after_a_commit(scene: Scene) -> None:
    fired = scene.arm("checkpoint.committed", f"kill step={EVERY}")
    job = finished(scene.client, scene.submit().id)
    assert fired.exists()
    first, second = job.attempts
    assert reasons(job.attempts) == ["WORKER_LOST", "COMPLETED"]
    assert first.first_failure
    assert first.first_failure.rank == 0
    assert second.from_step == EVERY, "the checkpoint that was committed is used"
    assert_exact(scene, job)
    assert_nothing_left(scene, job)


def test_row_4_rank_0_killed_between_the_last_shard_and_the_manifest(scene: Scene) -> None:
    fired = scene.arm("checkpoint.before_manifest", f"kill step={2 * EVERY}")
    job = finished(scene.client, scene.submit().id)
    assert fired.exists()
    assert job.attempts[1].from_step == EVERY, "shards without a manifest are no checkpoint"
    assert_exact(scene, job)
    assert_nothing_left(scene, job)


def test_row_5_a_stopped_worker_is_found_and_named(scene: Scene) -> None:
    fired = scene.arm("loop.step", f"stop rank=1 step={EVERY + 10}")
    job = finished(scene.client, scene.submit().id)
    assert fired.exists()
    first = job.attempts[0]
    assert first.exit_reason == "WORKER_HUNG"
    assert first.first_failure
    assert first.first_failure.rank == 1
    assert "ank 1" in first.exit_message
    assert_exact(scene, job)
    assert_nothing_left(scene, job)


@pytest.mark.parametrize("step", [0, 7])
def test_row_41_an_error_that_comes_back_ends_the_job_after_two_attempts(scene: Scene, step: int) -> None:
    scene.arm("loop.step", f"raise always step={step}")
    job = scene.client.jobs.wait(scene.submit(retry={"max_user_failures": 5}).id, 90, poll_s=0.2)
    assert (job.state, job.reason, job.num_attempts) == ("FAILED", "CRASH_LOOP", 2)
    assert "failpoint loop.step was hit" in job.message
    assert_nothing_left(scene, job)


def test_row_43_a_stale_build_lock_holds_nobody_up(scene: Scene) -> None:
    # Every run of this stack has found it there; nothing of ours compiles, so nothing has waited for it.
    finished(scene.client, scene.submit().id)
    assert [
        path.relative_to(scene.extensions).as_posix() for path in scene.extensions.rglob("*") if path.is_file()
    ] == [f"{STALE_LOCK}/lock"]
