"""Ray Train V2 with less around it. The only file that touches its internals; Ray is pinned to the exact version.

What is left out, and why (measured on 2 cores, 2 workers: fit to train function 3-4 s instead of 7-8 s):

- Runtime environments of controller and workers, which carry nothing but RAY_TRAIN_… variables: with one, Ray cannot
  use the worker processes it has already started. The variables are set inside the processes instead.
- The detached actor that removes the placement group of a dead controller: a dead controller ends the driver, and Ray
  removes a placement group once its creator and its job are both gone.
- The actor that splits Ray data sets (200 MiB): we have none.
- The registration with Ray Data's autoscaling coordinator, a detached actor that would outlive the job that made it and
  look like something left over. Whether there is room is the scheduler's business.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import RayTrainWorker, WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.result import Result
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Preemption comes as an order of the control plane.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Output is ours: see workers/logs.py.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}


class Trainer(DataParallelTrainer):
    """One run of one worker group. `controller` is there while it runs."""

    def __init__(self, *arguments: Any, start_timeout_s: float, **options: Any) -> None:
        self.controller: ActorHandle | None = None
        self._environment = ENVIRONMENT | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_timeout_s)}
        # What Ray Train reads in this process.
        os.environ.update(self._environment)
        super().__init__(*arguments, **options)

    def _create_default_callbacks(self) -> list[Any]:
        unwanted = PlacementGroupCleanerCallback | DatasetsCallback
        return [c for c in super()._create_default_callbacks() if not isinstance(c, unwanted)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        controller_class = ray.remote(num_cpus=0, scheduling_strategy=here)(_Controller)
        arguments["scaling_policy"] = _FixedSize(self.scaling_config)
        self.controller = controller_class.remote(self._environment, **arguments)
        ray.get(self.controller.run.remote())
        result: Result = ray.get(self.controller.get_result.remote())
        return result


class _FixedSize(FixedScalingPolicy):
    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _Worker(RayTrainWorker):
    def __init__(self) -> None:
        os.environ.update(ENVIRONMENT)
        super().__init__()


class _WorkerGroup(WorkerGroup):
    _worker_cls = _Worker

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: dict[str, Any]) -> dict[str, Any]:
        return custom_runtime_env


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup

    def __init__(self, environment: dict[str, str], **arguments: Any) -> None:
        os.environ.update(environment)
        super().__init__(**arguments)
