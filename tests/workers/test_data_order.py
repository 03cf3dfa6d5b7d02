"""The order of training samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.data.order import batch_indices, epoch_of, indices_at, repeated_at, sample_at

SEEDS = st.integers(0, 2**31 - 1)


@given(seed=SEEDS, num_examples=st.integers(1, 3000), epoch=st.integers(0, 10_000))
def test_an_epoch_visits_every_sample_once(seed: int, num_examples: int, epoch: int) -> None:
    indices = batch_indices(seed, num_examples, epoch * num_examples, num_examples)
    assert sorted(indices.tolist()) == list(range(num_examples))


@pytest.mark.parametrize("num_examples", range(1, 40))
def test_small_sets_too(num_examples: int) -> None:
    indices = batch_indices(7, num_examples, 3 * num_examples, num_examples)
    assert sorted(indices.tolist()) == list(range(num_examples))


@given(seed=SEEDS, num_examples=st.integers(1, 50), start=st.integers(0, 10**12), count=st.integers(0, 120))
def test_a_range_is_its_positions_one_by_one(seed: int, num_examples: int, start: int, count: int) -> None:
    one_by_one = [sample_at(seed, num_examples, position) for position in range(start, start + count)]
    assert batch_indices(seed, num_examples, start, count).tolist() == one_by_one


def test_positions_may_be_asked_for_in_any_order() -> None:
    positions = np.random.default_rng(0).permutation(500)
    assert np.array_equal(indices_at(3, 101, positions), batch_indices(3, 101, 0, 500)[positions])


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(batch_indices(seed, 100, 100 * epoch, 100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_sample_is_as_likely_at_every_place_and_after_every_other() -> None:
    n, epochs = 7, 7000
    orders = batch_indices(0, n, 0, n * epochs).reshape(epochs, n)
    places = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    follows = np.zeros((n, n))
    np.add.at(follows, (orders[:, :-1].ravel(), orders[:, 1:].ravel()), 1)
    follows = follows[~np.eye(n, dtype=bool)]
    # Chi-square with 36 and 41 degrees of freedom: 80 is beyond the 1 - 1e-4 quantile of both.
    assert ((places - epochs / n) ** 2 / (epochs / n)).sum() < 80
    expected = epochs * (n - 1) / (n * (n - 1))
    assert ((follows - expected) ** 2 / expected).sum() < 80


def test_all_permutations_of_a_small_set_occur_alike() -> None:
    orders = batch_indices(1, 4, 0, 4 * 24_000).reshape(-1, 4)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # 23 degrees of freedom


def test_fourteen_million_samples_cost_nothing_to_enter() -> None:
    n = 14_197_122
    indices = batch_indices(0, n, 5 * n + 1000, 50_000)
    assert len(np.unique(indices)) == 50_000
    assert 0 <= indices.min() < indices.max() < n
    assert abs(indices.mean() / n - 0.5) < 0.01


def test_the_algorithm_never_changes() -> None:
    assert batch_indices(0, 60_000, 0, 6).tolist() == GOLDEN_START
    assert batch_indices(17, 1000, 999, 4).tolist() == GOLDEN_BOUNDARY


def test_epoch_of() -> None:
    assert [epoch_of(position, 10) for position in (0, 9, 10, 35)] == [0, 0, 1, 3]


GOLDEN_START = [52688, 56504, 7908, 10232, 35811, 39666]
GOLDEN_BOUNDARY = [178, 871, 149, 219]


# -- repeated augmentation ---------------------------------------------------------------------------------------------
def test_without_repeats_nothing_changes() -> None:
    positions = np.arange(0, 2500)
    samples, occurrences = repeated_at(3, 1000, positions, 1)
    assert np.array_equal(samples, indices_at(3, 1000, positions))
    assert np.array_equal(occurrences, positions // 1000)


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_each_image_has_its_views_together_and_all_differ(repeats: int) -> None:
    num_examples, block = 64 * repeats * 5, 64 * repeats
    samples, occurrences = repeated_at(1, num_examples, np.arange(2 * num_examples), repeats)
    assert len(set(zip(samples.tolist(), occurrences.tolist(), strict=True))) == len(samples)
    for start in range(0, len(samples), block):
        found, counts = np.unique(samples[start : start + block], return_counts=True)
        assert len(found) == 64
        assert (counts == repeats).all()
    assert len(np.unique(samples[:num_examples])) == num_examples // repeats


def test_repeated_views_never_meet_themselves_and_change_partners() -> None:
    samples, _ = repeated_at(1, 64 * 3, np.arange(64 * 3), 3)
    pairs = {(int(a), int(b)) for a, b in samples.reshape(-1, 2)}
    assert all(a != b for a, b in pairs)
    assert len(pairs) == len(samples) // 2


@pytest.mark.parametrize("num_examples", [1, 5, 63, 70, 200, 1000])
def test_any_number_of_examples_can_be_repeated(num_examples: int) -> None:
    positions = np.arange(3 * num_examples)
    samples, _ = repeated_at(0, num_examples, positions, 3)
    assert samples.min() >= 0
    assert samples.max() < num_examples
    one_by_one = [repeated_at(0, num_examples, positions[i : i + 1], 3)[0][0] for i in range(len(positions))]
    assert samples.tolist() == one_by_one
