"""Ray Tune's controller with less around it. The only file that touches Tune's internals; Ray is pinned exactly.

Tune places a trial's workers as a placement group, starts and ends them, keeps the trials' states and asks an algorithm
for the next one and a scheduler what a result means. What is left out, and why:

- Trainables. Tune would start a process for each trial that only passes results on; here the actor that Tune starts is
  rank 0 itself, and results come from the hub, where ranks push them anyway.
- Runtime environments of trial actors (one variable): with one, Ray cannot use the processes it has already started.
- Graceful stops. A trial that is stopped has nothing to say any more: its actor is killed and its placement group
  removed in the same breath.
- Everything on disk: experiment state, trial directories, checkpoints. Our rows and manifests are the truth.
- Waiting inside: `turn` does what can be done now.
"""

from __future__ import annotations

from typing import Any, Protocol

import ray
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import SearchAlgorithm
from ray.util.placement_group import PlacementGroup

from workers.search.rank_process import RankProcess


class TuneTrial(Trial):
    """One attempt of one of our trials, as Tune sees it."""

    def __init__(self, attempt_id: str, bundles: list[dict[str, float]]) -> None:
        factory = PlacementGroupFactory(bundles, strategy="PACK")
        # A stub: there is no trainable to look up.
        super().__init__("patchwork", trial_id=attempt_id, placement_group_factory=factory, stub=True)

    def init_local_path(self) -> None:
        pass

    def set_ray_actor(self, ray_actor: Any) -> None:
        self.temporary_state.ray_actor = ray_actor


class Listener(Protocol):
    """The driver, as the controller calls it."""

    def next_trial(self) -> TuneTrial | None:
        """The next one to place, if one is to be placed now."""
        ...

    def judge(self, trial: TuneTrial, step: int, value: float) -> bool:
        """Whether the trial goes on after this result."""
        ...

    def on_placed(self, trial: TuneTrial, actor: Any, placement_group: PlacementGroup) -> None:
        """Rank 0's process runs."""
        ...

    def on_lost(self, trial: TuneTrial, error: Exception) -> None:
        """Rank 0's process could not be started."""
        ...


class _Algorithm(SearchAlgorithm):
    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def next_trial(self) -> Trial | None:
        return self._listener.next_trial()

    def is_finished(self) -> bool:
        return False


class _Scheduler(FIFOScheduler):
    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:  # noqa: ARG002
        assert isinstance(trial, TuneTrial)
        goes_on = self._listener.judge(trial, result["step"], result["value"])
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


class Controller(TuneController):
    """Places trials and ends them; everything else is the listener's."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._rank_class = ray.remote(max_restarts=0)(RankProcess)
        super().__init__(search_alg=_Algorithm(listener), scheduler=_Scheduler(listener))
        # The listener gives out no more trials than there are places.
        self._max_pending_trials = 10_000

    def turn(self) -> None:
        """Takes new trials, places what can be placed now, and begins those that were."""
        while (trial := self._search_alg.next_trial()) is not None:
            self.add_trial(trial)
        self._maybe_add_actors()
        while self._actor_manager.next(timeout=0.0):
            pass

    def report(self, trial: TuneTrial, step: int, value: float) -> bool:
        """Judges a result. Returns whether the trial goes on; one that does not has left its workers."""
        self._on_training_result(trial, {"step": step, "value": value, "training_iteration": step})
        return bool(trial.status == Trial.RUNNING)

    def end(self, trial: TuneTrial) -> None:
        """Ends a trial's processes and frees its workers; nothing if that was done."""
        self.stop_trial(trial)
        # A trial that waited for its place.
        self._staged_trials.discard(trial)
        self._trials.remove(trial)

    def close(self) -> None:
        """Ends everything that is placed."""
        for trial in list(self._trials):
            self.end(trial)
        self._actor_manager.cleanup()

    # -- what is left out ----------------------------------------------------------------------------------------------
    def _create_checkpoint_manager(self) -> None:
        return None

    def checkpoint(self, force: bool = False, wait: bool = False) -> None:
        pass

    def _schedule_trial_actor(self, trial: Trial) -> None:
        tracked = self._actor_manager.add_actor(
            cls=self._rank_class,
            resource_request=trial.placement_group_factory,
            kwargs={},
            on_start=self._actor_started,
            on_stop=self._actor_stopped,
            on_error=self._actor_failed,
        )
        self._trial_to_actor[trial] = tracked
        self._actor_to_trial[tracked] = trial

    def _schedule_trial_train(self, trial: Trial) -> None:
        """Called when rank 0's process runs, and after every result that lets the trial go on."""
        assert isinstance(trial, TuneTrial)
        if trial.run_metadata.last_result:
            return
        actor, resources = self._actor_manager._live_actors_to_ray_actors_resources[self._trial_to_actor[trial]]
        self._listener.on_placed(trial, actor, resources.placement_group)

    def _remove_actor(self, tracked_actor: TrackedActor) -> None:
        if self._actor_manager.remove_actor(tracked_actor, kill=True):
            self._actor_manager._try_kill_actor()

    def _actor_failed(self, tracked_actor: TrackedActor, exception: Exception) -> None:
        trial = self._actor_to_trial[tracked_actor]
        self._staged_trials.discard(trial)
        super()._actor_stopped(tracked_actor)
        self._listener.on_lost(trial, exception)
