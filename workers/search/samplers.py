"""Where the settings of a search come from: drawn at random, from a grid, or by Optuna's TPE.

A sampler is asked for setting 0, 1, … and told how each ended. It keeps nothing on disk: asked and told once more in
the same order, it gives the same settings again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from configs.search import (
    Choice,
    IntUniform,
    LogUniform,
    Parameter,
    Setting,
    Uniform,
    finite_values,
    grid,
    in_order,
    is_active,
    value_at_unit,
)
from configs.spec import SearchJob


@dataclass(frozen=True)
class Outcome:
    """How a setting ended."""

    value: float | None
    """None: it left none."""
    step: int = 0
    """Of the value."""
    is_complete: bool = True
    """It was not stopped on its way."""


class Sampler(Protocol):
    def ask(self, index: int) -> Setting | None:
        """The next setting; `index` counts from 0 without gaps. None: there are no more."""
        ...

    def tell(self, index: int, params: Setting, outcome: Outcome) -> None:
        """How setting `index`, which was tried as `params`, ended."""
        ...


def make_sampler(search: SearchJob) -> Sampler:
    if search.algorithm == "grid":
        return GridSampler(search.space)
    if search.algorithm == "tpe":
        # The search's first budget decides, not what it grew to: the same settings must come again.
        num_startup = min(10, max(2, search.budget.trials // search.repeats // 4))
        return TpeSampler(search.space, search.seed, search.sign > 0, num_startup)
    return RandomSampler(search.space, search.seed)


class RandomSampler:
    """Each setting depends on the seed and its index alone."""

    def __init__(self, space: Mapping[str, Parameter], seed: int) -> None:
        self._space, self._seed = space, seed
        self._keys = in_order(space)

    def ask(self, index: int) -> Setting:
        setting: Setting = {}
        for key in self._keys:
            # A draw of its own for each key: a condition that is not met shifts no others.
            unit = random.Random(f"{self._seed}/{index}/{key}").random()
            if is_active(self._space[key], setting):
                setting[key] = value_at_unit(self._space[key], unit)
        return setting

    def tell(self, index: int, params: Setting, outcome: Outcome) -> None:
        pass


class GridSampler:
    """Every setting of a finite space once."""

    def __init__(self, space: Mapping[str, Parameter]) -> None:
        self._settings = list(grid(space))

    def ask(self, index: int) -> Setting | None:
        return self._settings[index] if index < len(self._settings) else None

    def tell(self, index: int, params: Setting, outcome: Outcome) -> None:
        pass


class TpeSampler:
    """Optuna's tree-structured Parzen estimator over all parameters together (multivariate, grouped by condition)."""

    def __init__(self, space: Mapping[str, Parameter], seed: int, is_maximised: bool, num_startup: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._space = space
        self._keys = in_order(space)
        # Some of these options are marked experimental; Optuna is pinned.
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=num_startup
            )
        direction = "maximize" if is_maximised else "minimize"
        self._study = optuna.create_study(direction=direction, sampler=sampler)
        self._asked: dict[int, tuple[Any, Setting]] = {}

    def ask(self, index: int) -> Setting:
        trial = self._study.ask()
        setting: Setting = {}
        for key in self._keys:
            if is_active(self._space[key], setting):
                setting[key] = self._suggest(trial, key)
        self._asked[index] = trial, setting
        return setting

    def tell(self, index: int, params: Setting, outcome: Outcome) -> None:
        trial, setting = self._asked.pop(index)
        states = self._optuna.trial.TrialState
        if setting != params:
            # Recorded by another version of the sampler: what was tried counts, not what this one would have tried.
            self._study.tell(trial, state=states.FAIL)
            if outcome.value is not None:
                self._study.add_trial(self._as_it_was(params, outcome.value))
        elif outcome.value is None:
            self._study.tell(trial, state=states.FAIL)
        elif outcome.is_complete:
            self._study.tell(trial, outcome.value)
        else:
            trial.report(outcome.value, outcome.step)
            self._study.tell(trial, state=states.PRUNED)

    def _suggest(self, trial: Any, key: str) -> Any:
        parameter = self._space[key]
        values = finite_values(parameter) if not isinstance(parameter, IntUniform) else None
        if isinstance(parameter, Choice):
            # By position: Optuna takes no lists or mappings.
            return parameter.values[trial.suggest_categorical(key, list(range(len(parameter.values))))]
        if values is not None:
            # As a number of steps: they keep their order, and no dust of a sum.
            return values[trial.suggest_int(key, 0, len(values) - 1)]
        if isinstance(parameter, IntUniform):
            last = parameter.low + (parameter.high - parameter.low) // parameter.step * parameter.step
            return trial.suggest_int(key, parameter.low, last, step=parameter.step)
        assert isinstance(parameter, Uniform | LogUniform)
        return trial.suggest_float(key, parameter.low, parameter.high, log=isinstance(parameter, LogUniform))

    def _as_it_was(self, params: Setting, value: float) -> Any:
        distributions, internal = {}, {}
        for key, given in params.items():
            distributions[key], internal[key] = distribution_of(self._space[key], given)
        return self._optuna.trial.create_trial(params=internal, distributions=distributions, value=value)


def distribution_of(parameter: Parameter, value: Any) -> tuple[Any, Any]:
    """Optuna's distribution of a parameter, and what stands for `value` in it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(parameter, Choice):
        return CategoricalDistribution(list(range(len(parameter.values)))), list(parameter.values).index(value)
    if isinstance(parameter, IntUniform):
        last = parameter.low + (parameter.high - parameter.low) // parameter.step * parameter.step
        return IntDistribution(parameter.low, last, step=parameter.step), value
    values = finite_values(parameter)
    if values is not None:
        return IntDistribution(0, len(values) - 1), values.index(value)
    return FloatDistribution(parameter.low, parameter.high, log=isinstance(parameter, LogUniform)), value
