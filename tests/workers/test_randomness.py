from __future__ import annotations

import itertools

import torch

from workers.randomness import mix, seed_micro_step


def draw(seed: int, step: int, micro_index: int) -> list[float]:
    seed_micro_step(seed, step, micro_index)
    return torch.rand(4).tolist()


def test_a_micro_step_draws_the_same_again_whatever_came_between() -> None:
    first = draw(1, 20, 3)
    torch.rand(1000)
    draw(1, 21, 3)
    assert draw(1, 20, 3) == first


def test_every_place_in_training_draws_something_else() -> None:
    places = list(itertools.product((0, 1, 2), (0, 1, 2, 1000), (0, 1, 2, 3)))
    assert len({tuple(draw(*place)) for place in places}) == len(places)


def test_mix_is_frozen() -> None:
    """Changing it would change every resumed run."""
    assert [mix(0, 0, 0), mix(1, 2, 3), mix(3, 2, 1)] == [
        1279368494785126216,
        7510213797696614745,
        7716143592125757362,
    ]
    assert 0 <= mix(2**31 - 1, 2**40, 2**20) < 2**63
