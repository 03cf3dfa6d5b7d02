"""The launcher against a real Ray head: token on, loopback, its own short directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from configs.ids import attempt_id, new_job_id
from orchestrator.control.launcher import LaunchState, Refused, Unreachable
from orchestrator.control.ray_rest import RayLauncher
from orchestrator.embedded.ports import free_ports
from orchestrator.embedded.ray_head import RayHead

REPOSITORY = Path(__file__).parents[2]
LAUNCHED = "python -m tests.orchestrator.launched"
REAP = "python -m workers.reap"


def until(true: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    """Look until `true()` holds."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.1)


def new_attempt() -> str:
    return attempt_id(new_job_id(), 1)


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    log = tmp_path_factory.mktemp("ray") / "head.log"
    head = RayHead(log, num_cpus=4, env={"PYTHONPATH": str(REPOSITORY)})
    head.start()
    try:
        head.wait_ready()
        yield head
    finally:
        head.stop()


@pytest.fixture
def launcher(ray_head: RayHead) -> Iterator[RayLauncher]:
    with RayLauncher(ray_head.address, ray_head.token, LAUNCHED, REAP) as launcher:
        yield launcher


def quick(head: RayHead, entrypoint: str) -> RayLauncher:
    return RayLauncher(head.address, head.token, entrypoint, REAP)


@pytest.mark.stack
def test_cluster_has_an_identity_and_nodes(launcher: RayLauncher) -> None:
    status = launcher.cluster()
    assert status.cluster_id.startswith("session_")
    assert launcher.cluster().cluster_id == status.cluster_id
    (node,) = status.alive_nodes
    assert (node.cpus, node.gpus, node.accelerator, node.is_head) == (4.0, 0.0, None, True)


@pytest.mark.stack
def test_unknown_attempts_are_missing_and_leave_nothing(launcher: RayLauncher) -> None:
    attempt = new_attempt()
    assert launcher.status(attempt).state is LaunchState.MISSING
    assert launcher.leftovers(attempt) == []
    launcher.stop(attempt)
    launcher.reap(attempt)
    assert launcher.status(attempt).state is LaunchState.MISSING


@pytest.mark.stack
def test_a_repeated_submission_is_no_error_and_runs_once(ray_head: RayHead, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    attempt = new_attempt()
    with quick(ray_head, f"echo ran >> {marks}") as launcher:
        launcher.submit(attempt)
        launcher.submit(attempt)
        until(lambda: launcher.status(attempt).state is LaunchState.SUCCEEDED, "the job ends")
        launcher.submit(attempt)
    assert marks.read_text() == "ran\n"


@pytest.mark.stack
def test_a_failed_driver_says_so(ray_head: RayHead) -> None:
    attempt = new_attempt()
    with quick(ray_head, "sh -c 'echo last words; exit 3'") as launcher:
        launcher.submit(attempt)
        until(lambda: launcher.status(attempt).state.is_terminal, "the job ends")
        state, message = launcher.status(attempt)
    assert state is LaunchState.FAILED
    assert "last words" in message


@pytest.mark.stack
def test_nothing_secret_and_no_resources_travel_with_a_submission(ray_head: RayHead) -> None:
    attempt = new_attempt()
    with quick(ray_head, "true") as launcher:
        launcher.submit(attempt)
    details = httpx.get(f"{ray_head.address}/api/jobs/{attempt}", headers=ray_head.headers).json()
    assert details["entrypoint"] == "true"
    assert details["runtime_env"] == {"env_vars": {"PATCHWORK_ATTEMPT_ID": attempt, "RAY_JOB_STOP_WAIT_TIME_S": "10"}}
    assert details["metadata"] == {"patchwork": "1", "attempt_id": attempt}
    assert not details.get("entrypoint_num_cpus")


@pytest.mark.stack
def test_what_outlives_a_stopped_driver_is_seen_and_reaped(launcher: RayLauncher) -> None:
    attempt = new_attempt()
    launcher.submit(attempt)
    until(lambda: len(launcher.leftovers(attempt)) == 2, "actor and placement group are up")
    assert launcher.status(attempt).state is LaunchState.RUNNING
    launcher.stop(attempt)
    until(lambda: launcher.status(attempt).state is LaunchState.STOPPED, "the driver is stopped")
    actor, group = sorted(launcher.leftovers(attempt))
    assert "Survivor" in actor
    assert group.startswith("placement group ")
    launcher.reap(attempt)
    launcher.reap(attempt)
    until(lambda: launcher.leftovers(attempt) == [], "nothing is left")
    assert launcher.status(f"reap_{attempt}_001").state is LaunchState.MISSING, "one reaper was enough"


@pytest.mark.stack
def test_a_wrong_token_is_refused_not_unreachable(ray_head: RayHead) -> None:
    with RayLauncher(ray_head.address, "wrong", LAUNCHED, REAP) as launcher:
        for call in (launcher.cluster, lambda: launcher.submit(new_attempt()), lambda: launcher.leftovers("att_x")):
            with pytest.raises(Refused, match=r"40[13]"):
                call()


def test_a_cluster_that_does_not_answer_is_unreachable() -> None:
    (port,) = free_ports(1)
    with RayLauncher(f"http://127.0.0.1:{port}", "token", LAUNCHED, REAP) as launcher:
        for call in (launcher.cluster, lambda: launcher.submit(new_attempt()), lambda: launcher.status("att_x")):
            with pytest.raises(Unreachable, match=str(port)):
                call()
