"""The agent of one attempt: `python -m workers.driver`, the constant entrypoint of its Ray job.

    read_attempt     the attempt file, by the id that is also this Ray job's submission id
    claim_attempt    once; a second driver is told so and leaves
    start_workers    hub, couriers and the worker group
    forward_reports  what ranks pushed goes on to the control plane, orders come back   } every quarter
    watch_progress   has a rank failed, hung, not left in time?                         } of a second
    write_exit       why it ended, first failed rank, its last lines: exit.json; first writer wins

Exit status 0 whenever exit.json was written: Ray's job status then says only that the driver did its work.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import ray
import structlog
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.ids import parse_attempt_id, parse_checkpoint_id
from configs.layout import attempt_key, exit_key, rank_stream
from configs.reasons import ExitReason
from configs.service import Resources
from configs.states import Desired
from configs.wire import AttemptFile, ClaimRequest, ExitFile, RankFailure
from workers import logs
from workers.control_plane import ControlPlane
from workers.courier import Courier, Couriers
from workers.diagnosis import Evidence, Hang, RankEnd, Vanished, Verdict, diagnose, has_failed, narrow
from workers.forwarder import Forwarder
from workers.hub import Drained, ReportHub
from workers.node import NodeSettings, load_node_settings, open_store
from workers.progress import ProgressWatch
from workers.rank_main import rank_main
from workers.store import AlreadyExists, NotFound, ObjectStore, StoreError, StoreRefused
from workers.worker_group import GroupEnd, RayTrainWorkerGroup, WorkerGroup

log = structlog.get_logger(__name__)
TICK_S = 0.25
LEAVE_GRACE_S = 5.0
"""From the first rank's failure until the others are ended: they wait for it in a collective, or fail as well."""
LAST_LINES = 40
STACKS_S = 1.0
"""A rank writes its stacks within milliseconds of the signal, unless it is frozen."""
STACK_LINES = 150
MAX_SUSPECTS = 64
CLAIM_S = 10.0
FINAL_REPORT_S = 20.0
FLUSH_S = 10.0
EXIT_WRITE_S = 60.0
_HUB_TIMEOUT_S = 30.0


class DriverError(Exception):
    """The driver cannot begin: it does not know its attempt, or the attempt file cannot be read."""


class DriverHub(Protocol):
    """What the driver calls of workers.hub.ReportHub."""

    def drain(self, desired: Desired) -> Drained: ...


@dataclass
class Run:
    """One attempt under way, as its driver sees it."""

    attempt: AttemptFile
    settings: NodeSettings
    store: ObjectStore
    hub: DriverHub
    group: WorkerGroup
    forwarder: Forwarder
    couriers: Couriers
    is_node_alive: Callable[[str], bool]
    clock: Callable[[], float] = time.monotonic
    terminated: threading.Event = field(default_factory=threading.Event)
    """Set by SIGTERM: Ray was asked to stop this job."""
    order: Desired = Desired.RUN
    drained: Drained = field(default_factory=Drained)
    checkpoint_step: int | None = None
    started_at: float = 0.0
    ordered_at: float | None = None
    failed_at: float | None = None

    def __post_init__(self) -> None:
        self.started_at = self.clock()
        self.progress = ProgressWatch(self.settings.hang_timeout_s, self.settings.silent_timeout_s)


# -- 1 -----------------------------------------------------------------------------------------------------------------
def read_attempt(store: ObjectStore, attempt_id: str) -> AttemptFile:
    """What this attempt was given.

    Raises:
        DriverError: the file is missing or unreadable.
        StorageError: the store could not be used.
    """
    try:
        attempt = AttemptFile.model_validate_json(store.get(attempt_key(attempt_id)))
    except (NotFound, ValueError) as error:
        raise DriverError(f"attempt file of {attempt_id}: {error}") from error
    if attempt.attempt_id != attempt_id:
        raise DriverError(f"attempt file of {attempt_id} is of {attempt.attempt_id}")
    return attempt


# -- 2 -----------------------------------------------------------------------------------------------------------------
def claim_attempt(attempt: AttemptFile, settings: NodeSettings, cluster_id: str, spool_dir: Path) -> Forwarder:
    """Claims the attempt and returns the line to the control plane. Where the control plane is away, training starts
    all the same and the claim is repeated; `is_fenced` says that another driver has the attempt."""
    control_plane = ControlPlane(settings.api_url, settings.worker_secret.get_secret_value(), attempt.attempt_id)
    request = ClaimRequest(nonce=uuid.uuid4().hex, node=socket.gethostname(), pid=os.getpid(), cluster_id=cluster_id)
    forwarder = Forwarder(control_plane, request, spool_dir, _total_steps(attempt))
    forwarder.claim(CLAIM_S)
    return forwarder


def _total_steps(attempt: AttemptFile) -> int | None:
    total = (attempt.spec.get("schedule") or {}).get("total_steps")
    return total if isinstance(total, int) else None


# -- 3 -----------------------------------------------------------------------------------------------------------------
def start_workers(
    attempt: AttemptFile, settings: NodeSettings, scratch: Path, run_rank: Callable[..., Any] | None
) -> tuple[DriverHub, WorkerGroup]:
    """Starts the hub beside this process and begins to start the ranks."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(ReportHub).remote()
    hub = HubActor(actor)
    group = RayTrainWorkerGroup(
        attempt.attempt_id,
        attempt.world_size,
        Resources.model_validate(attempt.spec["resources"]),
        rank_main,
        # No secret: Ray shows this to whoever asks. Nodes have their own settings.
        {"attempt": attempt.model_dump_json(), "hub": actor, "run_rank": run_rank},
        scratch,
        settings.start_timeout_s,
    )
    group.start()
    return hub, group


class HubActor:
    """The hub as the driver calls it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def drain(self, desired: Desired) -> Drained:
        """Raises RayError or GetTimeoutError if the hub is gone."""
        drained: Drained = ray.get(self._actor.drain.remote(desired), timeout=_HUB_TIMEOUT_S)
        return drained


# -- 4 -----------------------------------------------------------------------------------------------------------------
def forward_reports(run: Run) -> None:
    """Moves what the ranks pushed to the forwarder, and the control plane's order to the ranks. An order to leave
    stays."""
    wanted = run.forwarder.desired
    if wanted is Desired.RUN and run.terminated.is_set():
        # Ray was told to stop this job, and the control plane did not say why: whoever wants it may have it again.
        wanted = Desired.YIELD
    if wanted is not Desired.RUN:
        run.order = wanted
        run.ordered_at = run.ordered_at or run.clock()
    run.drained = run.hub.drain(run.order)
    run.forwarder.put(run.drained)
    run.couriers.cover({info.node_id for info in run.drained.infos.values()})
    for checkpoint_id in run.drained.checkpoints:
        _, step, number = parse_checkpoint_id(checkpoint_id)
        if number == run.attempt.number:
            run.checkpoint_step = max(step, run.checkpoint_step or 0)


# -- 5 -----------------------------------------------------------------------------------------------------------------
def watch_progress(run: Run, group_end: GroupEnd | None) -> Evidence | None:
    """Everything known of the attempt's end, once it must end; None while it may go on."""
    now, ends = run.clock(), run.drained.ends
    if run.failed_at is None and any(map(has_failed, ends.values())):
        run.failed_at = now
    if run.forwarder.is_fenced:
        return evidence_of(run, fenced=True)
    if len(ends) == run.attempt.world_size:
        return evidence_of(run)
    if group_end is not None:
        return evidence_of(run, group_end=group_end)
    if run.ordered_at is not None and not run.drained.infos:
        return evidence_of(run)
    if run.ordered_at is not None and now - run.ordered_at > _grace_s(run):
        return evidence_of(run, forced=True)
    if run.failed_at is not None and now - run.failed_at > LEAVE_GRACE_S:
        return evidence_of(run, forced=True)
    missing = sorted(set(range(run.attempt.world_size)) - set(run.drained.infos))
    if missing and now - run.started_at > run.settings.start_timeout_s:
        error = f"Ranks {missing} did not start within {run.settings.start_timeout_s:.0f} s."
        return evidence_of(run, group_end=GroupEnd(error=error, timed_out_start=True))
    hang = run.progress.observe(now, run.drained.heartbeats, run.drained.silent_s, ends)
    return evidence_of(run, hang=hang) if hang else None


def _grace_s(run: Run) -> float:
    return run.settings.term_grace_s if run.terminated.is_set() else run.settings.stop_grace_s


def evidence_of(
    run: Run, *, group_end: GroupEnd | None = None, hang: Hang | None = None, fenced: bool = False, forced: bool = False
) -> Evidence:
    """What is known of the attempt's end now, for the diagnosis."""
    group_end = group_end or GroupEnd()
    ends = dict(run.drained.ends)
    vanished = []
    for rank, failure in group_end.failures.items():
        info = run.drained.infos.get(rank)
        node = info.node if info else ""
        if failure.has_died:
            is_gone = info is not None and not run.is_node_alive(info.node_id)
            oom_kills = run.couriers.num_oom_kills(info.node_id) if info is not None and not is_gone else 0
            vanished.append(Vanished(rank, node, failure.error_type, failure.message, is_gone, oom_kills))
        else:
            raised = RankEnd(
                rank, ExitReason.PLATFORM_ERROR, node, failure.message, error_type=failure.error_type, order=len(ends)
            )
            ends.setdefault(rank, raised)
    return Evidence(
        world_size=run.attempt.world_size,
        ends=ends,
        vanished=tuple(vanished),
        desired=run.order,
        fenced=fenced,
        hang=hang,
        group_error=group_end.error,
        timed_out_start=group_end.timed_out_start,
        died_starting=group_end.died_starting,
        forced=forced,
    )


def is_node_alive(node_id: str) -> bool:
    """Whether a node's raylet still listens: Ray itself notices a vanished node only after many seconds."""
    for node in ray.nodes():
        if node["NodeID"] != node_id:
            continue
        if not node["Alive"]:
            return False
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=2.0).close()
        except OSError:
            return False
        return True
    return False


# -- 6 -----------------------------------------------------------------------------------------------------------------
def write_exit(run: Run, evidence: Evidence, verdict: Verdict | None = None) -> ExitFile | None:
    """Ends the ranks, sends what is left of output and reports, and writes exit.json. Returns None if it could not be
    written; where one exists already, that one counts. With a `verdict` there is nothing to diagnose."""
    if evidence.hang is not None:
        evidence = replace(evidence, hang=_look_at_stacks(run, evidence.hang))
    run.group.stop()
    _drain_last(run)
    evidence = replace(evidence, ends={**run.drained.ends, **evidence.ends})
    exit_file = _exit_file(run, evidence, verdict or diagnose(evidence))
    log.info(
        "The attempt ends.", reason=str(exit_file.reason), message=exit_file.message, last_step=exit_file.last_step
    )
    if run.drained.dropped_metrics:
        log.warning("Metrics came faster than they could be taken.", dropped=run.drained.dropped_metrics)
    # Ray ends a driver soon after SIGTERM: then the verdict goes first. Otherwise who reads it finds the rest there.
    is_hurried = run.terminated.is_set()
    is_written = is_hurried and put_exit(run.store, exit_file, EXIT_WRITE_S)
    run.couriers.flush(FLUSH_S)
    if not run.forwarder.finish(FINAL_REPORT_S):
        log.warning("Not all reports could be delivered.")
    return exit_file if is_written or put_exit(run.store, exit_file, EXIT_WRITE_S) else None


def _look_at_stacks(run: Run, hang: Hang) -> Hang:
    """Where every rank stands goes into its output; of several suspects the one that others wait for is chosen."""
    infos = run.drained.infos
    for info in infos.values():
        run.couriers.dump_stacks(info.node_id, [info.pid])
    if len(hang.suspects) < 2:
        return hang
    time.sleep(STACKS_S)
    stacks = {
        rank: run.couriers.last_lines(infos[rank].node_id, rank_stream(rank), STACK_LINES)
        for rank in hang.suspects[:MAX_SUSPECTS]
        if rank in infos
    }
    return narrow(hang, stacks, {rank: info.node for rank, info in infos.items()})


def _drain_last(run: Run) -> None:
    try:
        forward_reports(run)
    except (RayError, GetTimeoutError):
        log.warning("The hub is gone; its last reports are lost.")


def _exit_file(run: Run, evidence: Evidence, verdict: Verdict) -> ExitFile:
    steps = [max(_step_of(run, rank), 0) for rank in range(run.attempt.world_size)]
    committed = [e.checkpoint_step for e in evidence.ends.values() if e.checkpoint_step is not None]
    return ExitFile(
        attempt_id=run.attempt.attempt_id,
        reason=verdict.reason,
        message=logs.clean(verdict.message),
        first_failure=_with_last_lines(run, verdict),
        last_step=min(steps, default=0),
        checkpoint_step=max(
            [*committed, *([run.checkpoint_step] if run.checkpoint_step is not None else [])], default=None
        ),
        sound_step=min((e.sound_step for e in evidence.ends.values() if e.sound_step is not None), default=None),
        ended_at=datetime.now(UTC),
    )


def _step_of(run: Run, rank: int) -> int:
    end, beat = run.drained.ends.get(rank), run.drained.heartbeats.get(rank)
    return max(end.step if end else 0, beat.step if beat else 0)


def _with_last_lines(run: Run, verdict: Verdict) -> RankFailure | None:
    failure = verdict.first_failure
    info = run.drained.infos.get(failure.rank) if failure else None
    if failure is None or info is None:
        return failure
    lines = run.couriers.last_lines(info.node_id, rank_stream(failure.rank), LAST_LINES)
    return failure.model_copy(update={"message": logs.clean(failure.message), "last_lines": lines})


def put_exit(store: ObjectStore, exit_file: ExitFile, deadline_s: float) -> bool:
    """Writes exit.json unless there is one; repeats while the store is away. Returns whether one is there."""
    until = time.monotonic() + deadline_s
    while True:
        try:
            store.put(exit_key(exit_file.attempt_id), exit_file.model_dump_json().encode(), if_none_match=True)
            return True
        except AlreadyExists:
            return True
        except StoreError as error:
            log.error("exit.json could not be written.", error=str(error))
            if time.monotonic() > until:
                return False
            time.sleep(1.0)


# -- the whole ---------------------------------------------------------------------------------------------------------
def drive(run: Run) -> ExitFile | None:
    """Steps 4 to 6: until the attempt ends. Returns what was written, None if nothing could be."""
    group_end: GroupEnd | None = None
    while True:
        try:
            # A group that ended is drained once more: its ranks' last words count.
            forward_reports(run)
            evidence = watch_progress(run, group_end)
        except (RayError, GetTimeoutError) as error:
            evidence = evidence_of(run, group_end=GroupEnd(error=f"The hub is gone: {error}"))
        if evidence is not None:
            return write_exit(run, evidence)
        group_end = run.group.wait_first_failure(TICK_S)


def own_attempt_id(environment: Mapping[str, str]) -> str:
    """The attempt this process drives: the submission id of its Ray job.

    Raises:
        DriverError: this is no Ray job, or its submission id is not an attempt's.
    """
    try:
        metadata = json.loads(environment["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]
        attempt_id = str(metadata["job_submission_id"])
        parse_attempt_id(attempt_id)
    except (KeyError, ValueError, TypeError) as error:
        raise DriverError(f"not started as the Ray job of an attempt: {error!r}") from error
    return attempt_id


def keep_environment_to_driver(environment: MutableMapping[str, str]) -> None:
    """Takes this Ray job's environment variables (how long Ray waits for the driver to stop) out of what `ray.init`
    will give every actor: with a runtime environment they could not use the processes Ray has already started."""
    config = json.loads(environment["RAY_JOB_CONFIG_JSON_ENV_VAR"])
    (config.get("runtime_env") or {}).pop("env_vars", None)
    environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(config)


def main(run_rank: Callable[..., Any] | None = None) -> int:
    """Drives this Ray job's attempt to its end. Returns the exit status. `run_rank` is for tests."""
    logs.configure(sys.stderr)
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    try:
        attempt_id = own_attempt_id(os.environ)
        settings = load_node_settings()
        store = open_store(settings)
        try:
            return _drive_attempt(attempt_id, settings, store, terminated, run_rank)
        except Exception as error:
            log.error("The driver failed.", exc_info=True)
            message = f"The driver failed: {type(error).__name__}: {error}"[:2000]
            reason = _reason_of(error)
            exit_file = ExitFile(attempt_id=attempt_id, reason=reason, message=message, ended_at=datetime.now(UTC))
            return 0 if put_exit(store, exit_file, EXIT_WRITE_S) else 1
    except (DriverError, ValueError, OSError) as error:
        log.error("The driver cannot begin.", error=str(error))
        return 1


def _reason_of(error: Exception) -> ExitReason:
    if isinstance(error, StoreRefused):
        return ExitReason.STORAGE_REFUSED
    return ExitReason.STORAGE_ERROR if isinstance(error, StoreError) else ExitReason.PLATFORM_ERROR


def _drive_attempt(
    attempt_id: str,
    settings: NodeSettings,
    store: ObjectStore,
    terminated: threading.Event,
    run_rank: Callable[..., Any] | None,
) -> int:
    keep_environment_to_driver(os.environ)
    ray.init(log_to_driver=False, logging_level="warning")
    # ray.init brings a handler of its own.
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    context = ray.get_runtime_context()
    node_id = context.get_node_id()
    node_dir = logs.node_log_dir(settings.log_dir, attempt_id, node_id)
    # Never closed: threads write to it until this process ends.
    logs.configure(sys.stderr, logs.open_stream(logs.log_path(node_dir, "driver")))
    # Beside the logs: what a killed driver leaves goes with them.
    scratch = node_dir / "scratch"
    attempt = read_attempt(store, attempt_id)
    forwarder = claim_attempt(attempt, settings, context.get_session_name(), scratch / "spool")
    if forwarder.is_fenced:
        log.error("Another driver has this attempt, or it has ended: this one leaves.")
        return 0
    forwarder.start()
    couriers = Couriers(attempt_id, Courier(attempt_id, settings.log_dir, node_id, store), node_id)
    if attempt.spec["kind"] == "search":
        # Ray Tune takes a second to import: for those who need it.
        from workers.search.driver import drive_search

        status = 0 if drive_search(attempt, settings, store, forwarder, couriers, scratch, terminated, run_rank) else 1
        shutil.rmtree(scratch, ignore_errors=True)
        return status
    hub, group = start_workers(attempt, settings, scratch / "train", run_rank)
    run = Run(attempt, settings, store, hub, group, forwarder, couriers, is_node_alive, terminated=terminated)
    status = 0 if drive(run) is not None else 1
    shutil.rmtree(scratch, ignore_errors=True)
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through interpreter shutdown: threads wait in Ray, and the end of this process is what ends the job's actors.
    os._exit(status)
