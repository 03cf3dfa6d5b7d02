"""The processes of an attempt's ranks: started together, ended together, and the first failure seen.

Ray places, starts and kills the processes. It is not asked for retries (one group is one attempt), checkpoints, metrics
or its own elasticity; `ray.train.report` is never called.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from configs.service import Resources
from workers.ray_train import Trainer

_MESSAGE_CHARS = 2_000
_STOP_WAIT_S = 5.0


@dataclass(frozen=True)
class ProcessFailure:
    """What is known of a rank's process that died, or whose function raised."""

    error_type: str
    message: str
    has_died: bool = True


@dataclass(frozen=True)
class GroupEnd:
    """How a group ended: in peace if there is neither a failure nor an error."""

    failures: dict[int, ProcessFailure] = field(default_factory=dict)
    error: str = ""
    timed_out_start: bool = False
    died_starting: bool = False
    """A process was lost before its rank began, as on a node that Ray does not know to be dead yet."""


class WorkerGroup(Protocol):
    """One attempt's ranks."""

    def start(self) -> None:
        """Begins to place and start the processes; returns at once."""
        ...

    def wait_first_failure(self, timeout_s: float) -> GroupEnd | None:
        """How the group ended, as soon as one process failed or all ended; None if nothing happened in time."""
        ...

    def stop(self) -> None:
        """Ends every process now."""
        ...


class RayTrainWorkerGroup:
    """A worker group on Ray Train V2: fixed size, no retries, named after the attempt.

    Args:
        rank_main: what each rank runs; it takes `config`, which must hold no secret (Ray shows it).
        storage_dir: a local directory for what Ray Train writes at start; nothing of value goes there.
    """

    def __init__(
        self,
        attempt_id: str,
        world_size: int,
        resources: Resources,
        rank_main: Callable[[dict[str, Any]], None],
        config: dict[str, Any],
        storage_dir: Path,
        start_timeout_s: float,
    ) -> None:
        self._end: GroupEnd | None = None
        self._ended = threading.Event()
        self._trainer = Trainer(
            rank_main,
            train_loop_config=config,
            scaling_config=_scaling(world_size, resources),
            run_config=RunConfig(
                name=attempt_id,
                storage_path=str(storage_dir),
                # -1 would retry a group that cannot be placed for ever.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
            start_timeout_s=start_timeout_s,
        )
        self._thread = threading.Thread(target=self._fit, name="worker-group", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_first_failure(self, timeout_s: float) -> GroupEnd | None:
        self._ended.wait(timeout_s)
        return self._end

    def stop(self) -> None:
        """Kills the controller; Ray then kills the ranks, which it owns. Their places are free when the driver ends."""
        if self._trainer.controller is not None and not self._ended.is_set():
            with contextlib.suppress(RayError):
                ray.kill(self._trainer.controller)
            self._ended.wait(_STOP_WAIT_S)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
            self._end = GroupEnd()
        except WorkerGroupError as error:
            self._end = GroupEnd(failures={rank: _process_failure(e) for rank, e in error.worker_failures.items()})
        except ControllerError as error:
            failure = error.controller_failure
            has_timed_out = isinstance(failure, WorkerGroupStartupTimeoutError)
            self._end = GroupEnd(
                error=f"Ray could not place all workers in time. {_text(failure)}" if has_timed_out else _text(failure),
                timed_out_start=has_timed_out,
                died_starting=isinstance(failure, WorkerGroupStartupFailedError),
            )
        except Exception as error:  # noqa: BLE001 - whatever ends the group is a finding for the diagnosis
            self._end = GroupEnd(error=_text(error))
        finally:
            self._ended.set()


def _scaling(world_size: int, resources: Resources) -> ScalingConfig:
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    return ScalingConfig(
        num_workers=world_size,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker=per_worker,
        accelerator_type=resources.accelerator,
        placement_strategy="PACK",
    )


def _process_failure(error: Exception) -> ProcessFailure:
    cause = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error
    has_died = isinstance(cause, RayError | WorkerHealthCheckTimeoutError)
    return ProcessFailure(type(cause).__name__, str(cause)[:_MESSAGE_CHARS], has_died)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_MESSAGE_CHARS]
