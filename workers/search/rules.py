"""When a trial is stopped on its way, or replaced: pure functions of the curves as they are known now.

Nothing is remembered between calls, so a driver that begins again decides by the same curves. A trial is judged where a
new point takes it past a mark; a point that was known before is not judged again.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from configs.search import (
    Asha,
    Choice,
    MedianStopping,
    Parameter,
    Pbt,
    Setting,
    finite_values,
    is_active,
    value_at_unit,
)

Curve = Sequence[tuple[int, float]]
"""Step and value, by step."""
MIN_JUDGED = 1


@dataclass(frozen=True)
class Exploit:
    """Replace a trial by one that goes on from `parent`."""

    parent: int
    step: int
    params: Setting
    message: str


def rungs(rule: Asha, total_steps: int) -> list[int]:
    """The steps at which trials are compared."""
    found, step = [], rule.grace_steps
    while step < total_steps:
        found.append(step)
        step *= rule.reduction
    return found


def asha(
    rule: Asha, sign: float, number: int, curves: Mapping[int, Curve], before_step: int, total_steps: int
) -> str | None:
    """Why trial `number` is stopped at its newest point, or None. `before_step`: of the point before that one.

    At the highest rung that the newest point reached, its value is compared with those that others had there: it goes
    on if it is at or above their 1 - 1/reduction quantile. The first one at a rung goes on.
    """
    step, _ = curves[number][-1]
    reached = [rung for rung in rungs(rule, total_steps) if before_step < rung <= step]
    if not reached or step >= total_steps:
        return None
    rung = reached[-1]
    own = value_from(curves[number], rung)
    others = [v for n, curve in curves.items() if n != number and (v := value_from(curve, rung)) is not None]
    if own is None or not others:
        return None
    cutoff = _quantile([sign * v for v in others], 1.0 - 1.0 / rule.reduction)
    if sign * own >= cutoff:
        return None
    return (
        f"asha: at rung {rung} its value {own:.6g} is worse than {sign * cutoff:.6g}, which the best "
        f"1/{rule.reduction} of {len(others)} others reach"
    )


def median(
    rule: MedianStopping, sign: float, number: int, curves: Mapping[int, Curve], before_step: int, total_steps: int
) -> str | None:
    """Why trial `number` is stopped at its newest point, or None: its best value is worse than the median of what the
    others averaged up to that step."""
    step, _ = curves[number][-1]
    if step < rule.grace_steps or step >= total_steps or step <= before_step:
        return None
    best = max(sign * value for _, value in curves[number])
    averages = []
    for other, curve in curves.items():
        upto = [sign * value for at, value in curve if at <= step]
        if other != number and upto and curve[-1][0] >= step:
            averages.append(statistics.fmean(upto))
    if len(averages) < rule.min_trials:
        return None
    middle = statistics.median(averages)
    if best >= middle:
        return None
    return (
        f"median: at step {step} its best value {sign * best:.6g} is worse than {sign * middle:.6g}, the median of "
        f"{len(averages)} others' averages"
    )


def exploit(
    rule: Pbt,
    sign: float,
    number: int,
    curves: Mapping[int, Curve],
    params: Mapping[int, Setting],
    space: Mapping[str, Parameter],
    seed: int,
    before_step: int,
    total_steps: int,
    running: Collection[int] = (),
) -> Exploit | None:
    """By which trial `number` is replaced at its newest point, or None: at a multiple of the interval, if it is among
    the worst quantile of all that came to this step. The better one is drawn from the best quantile.

    Of `running` ones that are behind, the value at their last multiple of the interval counts: one that is bad and
    ahead of all others would be compared with nobody.
    """
    step, _ = curves[number][-1]
    if step % rule.interval_steps or step >= total_steps or step <= before_step:
        return None
    scores: dict[int, float] = {}
    for n, curve in curves.items():
        marks = {at: value for at, value in curve if at % rule.interval_steps == 0 and at <= step}
        if marks and (step in marks or n in running):
            scores[n] = sign * marks[max(marks)]
    size = min(math.ceil(len(scores) * rule.quantile), len(scores) // 2)
    if size < 1:
        return None
    # Of equals the older one is the better one.
    order = sorted(scores, key=lambda n: (-scores[n], n))
    best, worst = order[:size], order[-size:]
    if number not in worst or scores[best[0]] <= scores[number]:
        return None
    chance = random.Random(f"{seed}/pbt/{number}/{step}")
    parent = chance.choice([n for n in best if scores[n] > scores[number]])
    changed = mutate(rule, params[parent], space, chance)
    message = (
        f"pbt: at step {step} its value {sign * scores[number]:.6g} is among the worst {size} of {len(scores)}; "
        f"trial {parent} with {sign * scores[parent]:.6g} takes its place"
    )
    return Exploit(parent, step, changed, message)


def mutate(rule: Pbt, params: Setting, space: Mapping[str, Parameter], chance: random.Random) -> Setting:
    """The setting with each of its values drawn anew or moved a little, within the space."""
    changed: Setting = {}
    for key in sorted(params):
        parameter = space[key]
        is_drawn, unit, is_up = chance.random() < rule.resample_probability, chance.random(), chance.random() < 0.5
        values = finite_values(parameter)
        if not is_active(parameter, params):
            continue
        if is_drawn:
            changed[key] = value_at_unit(parameter, unit)
        elif values is not None and isinstance(parameter, Choice):
            changed[key] = params[key]
        elif values is not None:
            place = values.index(params[key]) + (1 if is_up else -1)
            changed[key] = values[min(len(values) - 1, max(0, place))]
        else:
            assert not isinstance(parameter, Choice)
            moved = params[key] * rule.factor if is_up else params[key] / rule.factor
            changed[key] = float(f"{min(parameter.high, max(parameter.low, moved)):.12g}")
    return changed


def value_from(curve: Curve, step: int) -> float | None:
    """The first value at or after a step."""
    return next((value for at, value in curve if at >= step), None)


def _quantile(values: list[float], share: float) -> float:
    """Linear between the ordered values, as numpy's percentile."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
