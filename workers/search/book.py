"""What a search has tried, what it tries next: the trials' records and the sampler, brought to where they were.

The sampler is asked for settings in order and told of ends in order; each record says after how many ends its setting
was asked for (`asked_after`) and which end its own was (`told`). Replayed in that order the sampler is what it was.
"""

from __future__ import annotations

import structlog

from configs.search import Setting
from configs.search_results import best_trial, by_setting
from configs.search_wire import SearchState, TrialCreate, TrialRecord
from configs.spec import SearchJob
from configs.states import JobState
from workers.search.samplers import Outcome, make_sampler

log = structlog.get_logger(__name__)


class Book:
    """The records of a search's trials, by number, and its sampler."""

    def __init__(self, search: SearchJob, state: SearchState) -> None:
        self.search = search
        self.num_trials = state.num_trials
        self.trials: dict[int, TrialRecord] = {trial.number: trial for trial in state.trials}
        self._sampler = make_sampler(search)
        self._settings: dict[int, Setting] = {}
        self._asked_after: dict[int, int] = {}
        self._told: set[int] = set()
        self._num_told = 0
        self._is_exhausted = False
        self._replay()

    # -- what comes next -----------------------------------------------------------------------------------------------
    def unfinished(self) -> list[TrialRecord]:
        """Trials that were made and have not ended, in order."""
        return [t for _, t in sorted(self.trials.items()) if not t.state.is_terminal]

    def next_trial(self) -> TrialCreate | None:
        """A trial that is to be made now; None: none within the budget, or the space has no more settings."""
        repeats, index = self.search.repeats, 0
        made = {(t.setting, t.repeat) for t in self.trials.values() if self._is_sampled(t)}
        while index < self.num_trials // repeats:
            setting = self._setting(index)
            if setting is None:
                return None
            for repeat in range(repeats):
                if (index, repeat) not in made:
                    return TrialCreate(
                        number=self.next_number,
                        setting=index,
                        repeat=repeat,
                        params=setting,
                        asked_after=self._asked_after[index],
                    )
            index += 1
        return None

    def final_trial(self) -> TrialCreate | None:
        """The final run, if one is wanted, not made yet, and there is a best setting."""
        best = best_trial(self.search, list(self.trials.values()))
        if self.search.final is None or best is None or any(t.role == "final" for t in self.trials.values()):
            return None
        return TrialCreate(number=self.next_number, role="final", setting=best.setting, params=best.params)

    def replacement(self, replaced: TrialRecord, parent: int, step: int, params: Setting) -> TrialCreate:
        """A trial that takes the place of another one."""
        return TrialCreate(
            number=self.next_number,
            setting=replaced.setting,
            params=params,
            parent=parent,
            parent_step=step,
            replaces=replaced.number,
        )

    @property
    def next_number(self) -> int:
        return max(self.trials, default=0) + 1

    @property
    def num_ended(self) -> int:
        return sum(trial.state.is_terminal for trial in self.trials.values())

    # -- what was heard ------------------------------------------------------------------------------------------------
    def note(self, trial: TrialRecord) -> None:
        """Take a trial's record as the control plane gave it, and tell the sampler what follows from it."""
        self.trials[trial.number] = trial
        if trial.told is not None:
            self._num_told = max(self._num_told, trial.told)
            self._tell_complete(self._num_told)

    def why_metric_is_missing(self, trial: TrialRecord) -> str | None:
        """Why no trial will have a value of the metric: this one came to its end without. None if it has one, not a
        number included, or did not come to its end."""
        if trial.state is not JobState.SUCCEEDED or trial.has_metric:
            return None
        return f"Trial {trial.number} came to its end without a value of {self.search.metric}: none will."

    # -- replaying -----------------------------------------------------------------------------------------------------
    def _replay(self) -> None:
        sampled = [t for _, t in sorted(self.trials.items()) if self._is_sampled(t)]
        first: dict[int, TrialRecord] = {}
        for trial in sampled:
            first.setdefault(trial.setting, trial)
        after = 0
        for index in range(max(first, default=-1) + 1):
            known = first.get(index)
            after = max(after, known.asked_after if known is not None else 0)
            self._num_told = after
            self._tell_complete(after)
            setting = self._ask(index)
            if known is not None and setting != known.params:
                log.warning("The sampler gives another setting than was tried; that one counts.", setting=index)
                self._settings[index] = known.params
        self._num_told = max((t.told for t in self.trials.values() if t.told is not None), default=0)
        self._tell_complete(self._num_told)

    def _setting(self, index: int) -> Setting | None:
        if index not in self._settings and not self._is_exhausted:
            self._ask(index)
        return self._settings.get(index)

    def _ask(self, index: int) -> Setting | None:
        setting = self._sampler.ask(index)
        if setting is None:
            self._is_exhausted = True
            return None
        self._settings[index] = setting
        self._asked_after[index] = self._num_told
        return setting

    def _tell_complete(self, up_to: int) -> None:
        """Tell the sampler of settings all of whose trials have ended, as the `up_to`-th end or before, in the order of
        their last ends."""
        ready: list[tuple[int, int]] = []
        results = {}
        for result in by_setting(self.search, [t for t in self.trials.values() if self._is_sampled(t)]):
            told = [t.told for t in result.trials if t.told is not None]
            index = result.trials[0].setting
            if index in self._told or index not in self._settings or len(told) < self.search.repeats:
                continue
            if max(told) <= up_to:
                ready.append((max(told), index))
                results[index] = result
        for _, index in sorted(ready):
            result = results[index]
            last = result.trials[-1]
            step = last.curve[-1][0] if last.curve else 0
            is_stopped = any(t.state is not JobState.SUCCEEDED for t in result.trials if t.value is not None)
            self._sampler.tell(index, result.params, Outcome(result.mean, step, not is_stopped))
            self._told.add(index)

    @staticmethod
    def _is_sampled(trial: TrialRecord) -> bool:
        return trial.role == "trial" and trial.replaces is None
