"""Early stopping and population-based training, as pure functions of curves."""

from __future__ import annotations

import random

import pytest

from configs.search import Asha, Choice, IntUniform, LogUniform, MedianStopping, Pbt, Uniform
from workers.search.rules import Exploit, asha, exploit, median, mutate, rungs, value_from

ASHA = Asha(name="asha", grace_steps=10, reduction=3)
TOTAL = 100


def flat(value: float, upto: int, every: int = 10) -> list[tuple[int, float]]:
    return [(step, value) for step in range(every, upto + 1, every)]


def test_rungs_end_before_the_trial_does() -> None:
    assert rungs(ASHA, TOTAL) == [10, 30, 90]
    assert rungs(ASHA, 90) == [10, 30]


def test_the_first_at_a_rung_goes_on() -> None:
    assert asha(ASHA, 1.0, 1, {1: flat(0.1, 10)}, 0, TOTAL) is None


def test_only_the_best_third_of_those_at_a_rung_goes_on() -> None:
    others = {n: flat(n / 10, 10) for n in range(1, 7)}
    stopped = [v for v in (0.05, 0.3, 0.43, 0.45, 0.9) if asha(ASHA, 1.0, 9, others | {9: flat(v, 10)}, 0, TOTAL)]
    # numpy.percentile of 0.1 … 0.6 at 66.7 % is 0.4333.
    assert stopped == [0.05, 0.3, 0.43]


def test_a_loss_is_better_the_lower() -> None:
    others = {n: flat(n / 10, 10) for n in range(1, 7)}
    assert asha(ASHA, -1.0, 9, others | {9: flat(0.05, 10)}, 0, TOTAL) is None
    message = asha(ASHA, -1.0, 9, others | {9: flat(0.5, 10)}, 0, TOTAL)
    assert message is not None
    assert "0.5 is worse than 0.266667" in message


@pytest.mark.parametrize(("before", "step"), [(10, 20), (20, 20), (90, 100)])
def test_between_rungs_and_at_the_end_nobody_is_judged(before: int, step: int) -> None:
    curves = {1: flat(0.9, step), 2: flat(0.1, step)}
    assert asha(ASHA, 1.0, 2, curves, before, TOTAL) is None


def test_a_trial_behind_in_time_is_compared_at_the_same_rung() -> None:
    curves = {1: [(10, 0.5), (30, 0.9)], 2: [(10, 0.6)]}
    assert asha(ASHA, 1.0, 2, curves, 0, TOTAL) is None, "0.6 beats the other's 0.5 at 10, not its 0.9"


def test_the_first_value_after_a_rung_stands_for_it() -> None:
    assert value_from([(8, 0.1), (16, 0.2)], 10) == 0.2
    assert value_from([(8, 0.1)], 10) is None


def test_median_stopping_waits_for_enough_others() -> None:
    rule = MedianStopping(name="median", grace_steps=20, min_trials=3)
    curves = {n: flat(0.5, 30) for n in range(1, 4)} | {9: flat(0.4, 20)}
    assert median(rule, 1.0, 9, curves, 10, TOTAL) is not None
    assert median(rule, 1.0, 9, {n: c for n, c in curves.items() if n != 3}, 10, TOTAL) is None
    assert median(rule, 1.0, 9, curves | {9: flat(0.4, 10)}, 0, TOTAL) is None, "within the grace steps"
    assert median(rule, 1.0, 9, curves | {9: [(10, 0.6), (20, 0.1)]}, 10, TOTAL) is None, "its best counts"


PBT = Pbt(name="pbt", interval_steps=20, quantile=0.25)
SPACE = {
    "optim.lr": LogUniform(type="log_uniform", low=1e-3, high=1.0),
    "data.mix.mixup": Uniform(type="uniform", low=0.0, high=0.8, step=0.2),
}


def test_the_worst_goes_on_from_one_of_the_best() -> None:
    curves = {n: flat(n / 10, 20) for n in range(1, 9)}
    params = {n: {"optim.lr": 0.01 * n, "data.mix.mixup": 0.4} for n in curves}
    found = exploit(PBT, 1.0, 1, curves, params, SPACE, 0, 10, TOTAL)
    assert found is not None
    assert found.parent in (7, 8)
    assert found.step == 20
    assert found.params != params[found.parent]
    assert exploit(PBT, 1.0, 1, curves, params, SPACE, 0, 10, TOTAL) == found, "the same seed, the same choice"
    assert exploit(PBT, 1.0, 3, curves, params, SPACE, 0, 10, TOTAL) is None, "not among the worst quarter"
    assert exploit(PBT, -1.0, 8, curves, params, SPACE, 0, 10, TOTAL) is not None


def test_equals_are_left_alone() -> None:
    curves = {n: flat(0.5, 20) for n in range(1, 5)}
    assert exploit(PBT, 1.0, 4, curves, {n: {"optim.lr": 0.1} for n in curves}, SPACE, 0, 10, TOTAL) is None


def test_one_that_is_bad_and_ahead_is_compared_with_those_behind_it() -> None:
    curves = {1: flat(0.1, 40), 2: flat(0.9, 30)}
    params = {n: {"optim.lr": 0.1} for n in curves}

    def judged(running: set[int]) -> Exploit | None:
        return exploit(PBT, 1.0, 1, curves, params, SPACE, 0, 30, TOTAL, running)

    found = judged({1, 2})
    assert found is not None
    assert (found.parent, found.step) == (2, 40), "from its newest checkpoint up to there"
    assert judged({1}) is None, "one that ended on its way is no measure of a later step"


def test_between_intervals_nobody_is_replaced() -> None:
    curves = {1: flat(0.1, 30), 2: flat(0.9, 30)}
    assert exploit(PBT, 1.0, 1, curves, {1: {}, 2: {}}, SPACE, 0, 20, TOTAL) is None


def test_changes_stay_within_the_space() -> None:
    space = SPACE | {
        "optim.name": Choice(type="choice", values=("a", "b")),
        "n": IntUniform(type="int", low=1, high=3),
    }
    start = {"optim.lr": 1.0, "data.mix.mixup": 0.8, "optim.name": "a", "n": 1}
    moved = [mutate(PBT, start, space, random.Random(seed)) for seed in range(50)]
    for setting in moved:
        assert 1e-3 <= setting["optim.lr"] <= 1.0
        assert setting["data.mix.mixup"] in (0.0, 0.2, 0.4, 0.6, 0.8)
        assert setting["n"] in (1, 2, 3)
    assert len({setting["optim.lr"] for setting in moved}) > 10
