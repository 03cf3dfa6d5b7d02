"""Removes what is left of an attempt whose driver is gone: `python -m workers.reap`, a constant entrypoint.

PATCHWORK_ATTEMPT_ID and PATCHWORK_RAY_JOB_ID name the attempt and the Ray job its driver opened. Processes are ended by
SIGKILL on their node, which is the proof of death that a new attempt waits for; Ray's own opinion of them comes after.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping

import psutil
import ray
import structlog
from ray import PlacementGroupID
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors, list_jobs, list_placement_groups

from configs.ids import parse_attempt_id
from workers import logs

log = structlog.get_logger(__name__)
_LIMIT = 10_000
_KILL_TIMEOUT_S = 30.0
_RAY_JOB_ID = re.compile(r"^[0-9a-f]{8}$")


def reap(attempt_id: str, ray_job_id: str) -> tuple[int, int]:
    """Ends the driver of the attempt, if it lives after all, and every actor's process of its Ray job; removes its
    placement groups. Returns the number of actors and of groups.

    Raises:
        ValueError: not the id of a Ray job, or that of this process's own.
    """
    if not _RAY_JOB_ID.match(ray_job_id) or ray_job_id == ray.get_runtime_context().get_job_id():
        raise ValueError(f"not the id of another Ray job: {ray_job_id!r}")
    _kill_driver(attempt_id)
    filters = [("job_id", "=", ray_job_id), ("state", "!=", "DEAD")]
    actors = list_actors(filters=filters, limit=_LIMIT, detail=True)
    for actor in actors:
        _kill_on_node(str(actor.node_id), kill_ray_process, int(actor.pid or 0))
    groups = list_placement_groups(
        filters=[("creator_job_id", "=", ray_job_id), ("state", "!=", "REMOVED")], limit=_LIMIT
    )
    for group in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group.placement_group_id))))
    return len(actors), len(groups)


def _kill_driver(attempt_id: str) -> None:
    """Ray may call a job failed whose driver still runs."""
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    for job in list_jobs(limit=_LIMIT, detail=True):
        if job.submission_id == attempt_id and job.driver_info is not None:
            node_id = nodes.get(job.driver_info.node_ip_address)
            if node_id is not None:
                _kill_on_node(node_id, kill_driver_process, int(job.driver_info.pid), attempt_id)


def _kill_on_node(node_id: str, kill: Callable[..., bool], pid: int, *arguments: str) -> None:
    """An actor that waits for a place has no process; one whose node is gone has none any more."""
    if pid <= 0:
        return
    placed = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=placed)(kill)
    try:
        ray.get(task.remote(pid, *arguments), timeout=_KILL_TIMEOUT_S)
    except (RayError, GetTimeoutError) as error:
        log.warning("A process could not be ended.", node=node_id, pid=pid, error=str(error)[:500])


def kill_ray_process(pid: int) -> bool:
    """SIGKILL to a process of Ray on this node. False, and nothing done, if the id belongs to something else by now."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
        command = psutil.Process(pid).cmdline()
        if command and command[0].startswith("ray::") and pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def kill_driver_process(pid: int, attempt_id: str) -> bool:
    """SIGKILL to the driver of an attempt. False, and nothing done, if the process is something else."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
        if attempt_id in psutil.Process(pid).environ().get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""):
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def main(environment: Mapping[str, str]) -> int:
    """Reaps what the environment names. Returns the exit status."""
    logs.configure(sys.stderr)
    attempt_id, ray_job_id = environment.get("PATCHWORK_ATTEMPT_ID", ""), environment.get("PATCHWORK_RAY_JOB_ID", "")
    try:
        parse_attempt_id(attempt_id)
        ray.init(log_to_driver=False, logging_level="warning")
        num_actors, num_groups = reap(attempt_id, ray_job_id)
    except ValueError as error:
        log.error("Nothing was reaped.", error=str(error))
        return 1
    log.info("Reaped.", attempt_id=attempt_id, num_actors=num_actors, num_placement_groups=num_groups)
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
