"""The second kind of worker group: plain actors in a trial's placement group, which Ray Tune asked for.

Rank 0's actor was started by Tune, the others are started here. When Tune removes the placement group, Ray ends every
process in it: a trial that is stopped frees its workers at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from workers.search.rank_process import RankProcess
from workers.worker_group import GroupEnd, ProcessFailure

_MESSAGE_CHARS = 2_000


class TrialWorkerGroup:
    """A worker group in a placement group whose bundle r is rank r's.

    Args:
        first: rank 0's actor, which runs already.
        config: what each rank is given; it must hold no secret.
    """

    def __init__(
        self, first: Any, placement_group: PlacementGroup, bundles: list[dict[str, float]], config: dict[str, Any]
    ) -> None:
        self._actors = [first]
        self._placement_group = placement_group
        self._bundles = bundles
        self._config = config
        self._ranks: dict[Any, int] = {}
        self._end: GroupEnd | None = None

    def start(self) -> None:
        for rank, bundle in enumerate(self._bundles[1:], start=1):
            place = PlacementGroupSchedulingStrategy(self._placement_group, placement_group_bundle_index=rank)
            options = ray.remote(
                num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), max_restarts=0, scheduling_strategy=place
            )
            self._actors.append(options(RankProcess).remote())
        nodes = placement_group_table(self._placement_group)["bundles_to_node_id"]
        for rank, actor in enumerate(self._actors):
            local_rank = sum(nodes.get(other) == nodes.get(rank) for other in range(rank))
            self._ranks[actor.run.remote(self._config, rank, local_rank)] = rank

    def wait_first_failure(self, timeout_s: float) -> GroupEnd | None:
        if self._end is not None or not self._ranks:
            return self._end
        ready, _ = ray.wait(list(self._ranks), num_returns=len(self._ranks), timeout=timeout_s)
        failures = {self._ranks[future]: failure for future in ready if (failure := _failure(future)) is not None}
        if failures or len(ready) == len(self._ranks):
            self._end = GroupEnd(failures=failures)
        return self._end

    def stop(self) -> None:
        """Ends every process now; Ray knows of some that they are gone already."""
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor)


def _failure(future: Any) -> ProcessFailure | None:
    try:
        ray.get(future)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        return ProcessFailure(type(cause).__name__, str(cause)[:_MESSAGE_CHARS], has_died=False)
    except RayError as error:
        return ProcessFailure(type(error).__name__, str(error)[:_MESSAGE_CHARS])
    return None


MakeGroup = Callable[[Any, PlacementGroup], TrialWorkerGroup]
