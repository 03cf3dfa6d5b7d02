"""What a search may vary, how long, and by which rules: the parts of `kind: search`.

A space maps dotted keys of the base description to parameters; a setting gives each active key a value. Nothing here
draws at random: `value_at_unit` maps a number in [0, 1) to a parameter's value, whoever drew it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from configs.base import Positive, Strict

Value = bool | int | float | str | list[Any] | dict[str, Any] | None
"""What a key may be set to."""
Setting = dict[str, Any]
"""Dotted key to value, of the keys that are active."""
SpaceKey = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*){0,9}$")]
MAX_KEYS = 50
MAX_TRIALS = 10_000
_Bound = Annotated[float, Field(ge=-1e15, le=1e15)]


class _Parameter(Strict):
    when: dict[SpaceKey, Value] = Field(
        default_factory=dict, max_length=10, description="Varied only where these other keys have these values."
    )


class Choice(_Parameter):
    """One of some values. `grid` says that a grid search is meant: every value in turn."""

    type: Literal["choice", "grid"]
    values: Annotated[tuple[Value, ...], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for index, value in enumerate(self.values):
            if any(_same(value, earlier) for earlier in self.values[:index]):
                raise ValueError(f"values: {value!r} is given twice")
        return self


class _Range(_Parameter):
    low: _Bound
    high: _Bound

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}: the range is empty")
        return self


class Uniform(_Range):
    """A real number, evenly; with `step` only low, low + step, …"""

    type: Literal["uniform"]
    step: Annotated[float, Field(gt=0.0, le=1e15)] | None = None

    @model_validator(mode="after")
    def _step_fits(self) -> Self:
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step {self.step:g} is more than the range from {self.low:g} to {self.high:g}")
        return self


class LogUniform(_Range):
    """A positive number, evenly in its logarithm."""

    type: Literal["log_uniform"]

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.low <= 0.0:
            raise ValueError(f"low {self.low:g} has no logarithm: log_uniform needs a low above 0")
        return self


class IntUniform(_Parameter):
    """A whole number, both ends included."""

    type: Literal["int"]
    low: Annotated[int, Field(ge=-(2**53), le=2**53)]
    high: Annotated[int, Field(ge=-(2**53), le=2**53)]
    step: Positive = 1

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}: the range is empty")
        if self.step > self.high - self.low:
            raise ValueError(f"step {self.step} is more than the range from {self.low} to {self.high}")
        return self


Parameter = Annotated[Choice | Uniform | LogUniform | IntUniform, Field(discriminator="type")]
Space = Annotated[dict[SpaceKey, Parameter], Field(min_length=1, max_length=MAX_KEYS)]


class Budget(Strict):
    """When a search starts no more trials. What runs when time or GPU-hours are used up is stopped."""

    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] = Field(
        description="Trials in all, repeats included; for pbt the size of the population."
    )
    gpu_hours: Annotated[float, Field(gt=0.0, le=1e9)] | None = Field(
        None, description="Of all trials; hours of workers where there is no GPU."
    )
    wall_clock_s: Annotated[float, Field(gt=0.0, le=3.2e7)] | None = Field(
        None, description="Seconds of running time of the search, waiting in the queue not counted."
    )


class NoScheduler(Strict):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"


class Asha(Strict):
    """Asynchronous successive halving: at each rung only the best 1/reduction of those that came there go on."""

    name: Literal["asha"]
    grace_steps: Positive = Field(description="The first rung; the next ones are at `reduction` times as many steps.")
    reduction: Annotated[int, Field(ge=2, le=16)] = 3


class MedianStopping(Strict):
    """Stop a trial whose best value so far is worse than the median of the others' averages up to the same step."""

    name: Literal["median"]
    grace_steps: Positive
    min_trials: Annotated[int, Field(ge=1, le=1000)] = Field(3, description="Others that must have come so far.")


class Pbt(Strict):
    """Population-based training: every `interval_steps` a trial of the worst quantile is replaced by a copy of one of
    the best, from that one's checkpoint, with what is varied changed a little."""

    name: Literal["pbt"]
    interval_steps: Positive
    quantile: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25
    resample_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25
    factor: Annotated[float, Field(gt=1.0, le=10.0)] = Field(
        1.2, description="A number that is not drawn anew is multiplied or divided by this."
    )


Scheduler = Annotated[NoScheduler | Asha | MedianStopping | Pbt, Field(discriminator="name")]


class Concurrency(Strict):
    """How many trials may run side by side: as many as the cluster has room for."""

    min: Annotated[int, Field(ge=1, le=1000)] = 1
    max: Annotated[int, Field(ge=1, le=1000)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


def _on_all_data() -> dict[SpaceKey, Value]:
    return {"data.holdout": None}


class FinalRun(Strict):
    """After the search, the best setting once more, with these changes: on all data, for instance."""

    overrides: dict[SpaceKey, Value] = Field(
        default_factory=_on_all_data, max_length=50, description="Dotted keys of the base."
    )


# -- settings of a space ----------------------------------------------------------------------------------------------
def in_order(space: Mapping[str, Parameter]) -> list[str]:
    """The keys, each after those its `when` names; of equals by name.

    Raises:
        ValueError: a `when` names a key that is not in the space, or they form a circle.
    """
    for key, parameter in space.items():
        for other in parameter.when:
            if other not in space:
                raise ValueError(f"space: {key} depends on {other}, which is not in the space")
    ordered: list[str] = []
    while len(ordered) < len(space):
        ready = sorted(k for k, p in space.items() if k not in ordered and all(other in ordered for other in p.when))
        if not ready:
            circle = ", ".join(sorted(set(space) - set(ordered)))
            raise ValueError(f"space: the conditions of {circle} depend on one another")
        ordered.extend(ready)
    return ordered


def is_active(parameter: Parameter, setting: Mapping[str, Any]) -> bool:
    """Whether the setting so far fulfils the parameter's condition. A list in `when` means any of its values."""
    for key, wanted in parameter.when.items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if key not in setting or not any(_same(setting[key], value) for value in allowed):
            return False
    return True


def finite_values(parameter: Parameter) -> list[Any] | None:
    """Every value the parameter can take, in order; None for a continuous one."""
    if isinstance(parameter, Choice):
        return list(parameter.values)
    if isinstance(parameter, IntUniform):
        return list(range(parameter.low, parameter.high + 1, parameter.step))
    if isinstance(parameter, Uniform) and parameter.step is not None:
        count = math.floor((parameter.high - parameter.low) / parameter.step + 1e-9) + 1
        return [_tidy(parameter.low + i * parameter.step) for i in range(count)]
    return None


def value_at_unit(parameter: Parameter, unit: float) -> Any:
    """The parameter's value at `unit` of its range, 0 <= unit < 1."""
    values = finite_values(parameter)
    if values is not None:
        return values[min(len(values) - 1, int(unit * len(values)))]
    assert isinstance(parameter, Uniform | LogUniform)
    low, high = parameter.low, parameter.high
    if isinstance(parameter, LogUniform):
        return min(high, max(low, _tidy(math.exp(math.log(low) + unit * (math.log(high) - math.log(low))))))
    return min(high, max(low, _tidy(low + unit * (high - low))))


def grid(space: Mapping[str, Parameter]) -> Iterator[Setting]:
    """Every setting of a finite space, the last key in order fastest.

    Raises:
        ValueError: a parameter is continuous.
    """
    keys = in_order(space)

    def below(index: int, setting: Setting) -> Iterator[Setting]:
        if index == len(keys):
            yield setting
            return
        key = keys[index]
        if not is_active(space[key], setting):
            yield from below(index + 1, setting)
            return
        values = finite_values(space[key])
        if values is None:
            raise ValueError(f"space: {key} is continuous: a grid needs choice, int, or uniform with a step")
        for value in values:
            yield from below(index + 1, setting | {key: value})

    return below(0, {})


def corners(space: Mapping[str, Parameter], num_mixed: int = 8) -> list[Setting]:
    """Settings that show what is wrong with a space: all lows, all highs, each value of each choice once, and some in
    between; the same ones each time."""
    keys = in_order(space)

    def at(units: Mapping[str, float]) -> Setting:
        setting: Setting = {}
        for key in keys:
            if is_active(space[key], setting):
                setting[key] = value_at_unit(space[key], units[key])
        return setting

    almost_one = 1.0 - 2.0**-53
    found = [at(dict.fromkeys(keys, 0.0)), at(dict.fromkeys(keys, almost_one))]
    for key in keys:
        parameter = space[key]
        if isinstance(parameter, Choice):
            count = len(parameter.values)
            for index in range(min(count, 50)):
                found.append(at(dict.fromkeys(keys, 0.0) | {key: (index + 0.5) / count}))
    # A low-discrepancy sequence: the fractional parts of multiples of irrational numbers.
    for number in range(1, num_mixed + 1):
        found.append(at({key: (number * math.sqrt(2 + 3 * i)) % 1.0 for i, key in enumerate(keys)}))
    return [setting for index, setting in enumerate(found) if setting not in found[:index]]


def _same(first: Any, second: Any) -> bool:
    """Equal as JSON: true is not 1."""
    if isinstance(first, bool) != isinstance(second, bool):
        return False
    return bool(first == second)


def _tidy(value: float) -> float:
    """Without the dust of a sum: 0.1 + 2 x 0.1 is 0.3."""
    return float(f"{value:.12g}")
