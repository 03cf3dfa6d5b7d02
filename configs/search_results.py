"""What a search found, from its trials' records alone. Pure: the driver and the API say the same."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from configs.search_wire import TrialRecord
from configs.spec import SearchJob
from configs.states import JobState


@dataclass(frozen=True)
class SettingResult:
    """One setting and how its trials did."""

    setting: int
    params: dict[str, Any]
    trials: tuple[TrialRecord, ...]
    """By number; those that left a value count."""
    is_complete: bool
    """All its repeats came to their end, none was stopped or failed."""

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(trial.value for trial in self.trials if trial.value is not None)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Of the values around their mean, as of a sample; None of fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def by_setting(search: SearchJob, trials: Iterable[TrialRecord]) -> list[SettingResult]:
    """The settings that were tried, in order. The final run is none of them; in population-based training every trial
    has a setting of its own, since those that replace others go on with changed ones."""
    groups: dict[int, list[TrialRecord]] = {}
    for trial in sorted(trials, key=lambda t: t.number):
        if trial.role == "trial":
            key = trial.number if search.scheduler.name == "pbt" else trial.setting
            groups.setdefault(key, []).append(trial)
    return [
        SettingResult(
            number,
            members[0].params,
            tuple(members),
            sum(t.state is JobState.SUCCEEDED and t.value is not None for t in members) == search.repeats,
        )
        for number, members in sorted(groups.items())
    ]


def ranked(search: SearchJob, trials: Iterable[TrialRecord]) -> list[SettingResult]:
    """Settings with a value, best first: those that came to their end before those that did not, since a value on the
    way says less; of equals the earlier one."""
    found = [result for result in by_setting(search, trials) if result.mean is not None]
    return sorted(found, key=lambda r: (not r.is_complete, -search.sign * (r.mean or 0.0), r.setting))


def best_trial(search: SearchJob, trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The best trial of the best setting; None while no trial has a value."""
    settings = ranked(search, trials)
    if not settings:
        return None
    candidates = [trial for trial in settings[0].trials if trial.value is not None]
    return min(candidates, key=lambda t: (-search.sign * (t.value or 0.0), t.number))
