"""Opening a job's data: synthetic images, holdout and subset, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.datasets import num_eval_examples, num_train_examples, synthetic_card
from configs.wire import DatasetCard
from tests.workers.image_sets import array_source, data_config
from workers.data import OpenedData, open_data
from workers.data.errors import DataError
from workers.data.open import check_against_card
from workers.data.source import ImageSource


def no_index(key: str) -> bytes:
    raise AssertionError(f"asked for {key}")


def open_synthetic(in_channels: int = 3, eval_only: bool = False, **fields: Any) -> tuple[OpenedData, DatasetCard]:
    sizes = fields.pop("sizes", {"num_train": 200, "num_eval": 60})
    data = data_config(source={"type": "synthetic", "image_size": 16, **sizes}, **fields)
    card = synthetic_card(data.source)
    return open_data(data, card, None, no_index, in_channels=in_channels, eval_only=eval_only), card


def train_of(opened: OpenedData) -> ImageSource:
    assert opened.train is not None
    return opened.train


def names(source: ImageSource) -> set[str]:
    return {source.name(i) for i in range(len(source))}


# -- synthetic images --------------------------------------------------------------------------------------------------
def test_synthetic_images_are_a_function_of_their_index() -> None:
    one, other = train_of(open_synthetic()[0]), train_of(open_synthetic()[0])
    together = one.read_many(np.array([5, 3, 5, 199]))
    assert together is not None
    assert together.shape == (4, 3, 16, 16)
    for place, index in enumerate([5, 3, 5, 199]):
        assert torch.equal(together[place], other.read(index))
    assert not torch.equal(together[0], one.read(15)), "two images of one class differ"


def test_synthetic_splits_differ_and_hold_all_classes() -> None:
    opened, _ = open_synthetic()
    assert not torch.equal(train_of(opened).read(0), opened.eval.read(0))
    assert np.bincount(train_of(opened).labels).tolist() == [20] * 10
    assert np.bincount(opened.eval.labels).tolist() == [6] * 10


@pytest.mark.parametrize("channels", [1, 3])
def test_synthetic_classes_can_be_told_apart(channels: int) -> None:
    """By the nearest mean of a very plain feature: the average colour and the strength of neighbouring differences."""
    opened, _ = open_synthetic(in_channels=channels)

    def features(source: ImageSource) -> torch.Tensor:
        images = source.read_many(np.arange(len(source)))
        assert images is not None
        x = images.float()
        slopes = [(x - x.roll(by, dims=axis)).abs().mean(dim=(1, 2, 3)) for axis in (-1, -2) for by in (1, 2, 3)]
        return torch.cat([x.mean(dim=(2, 3)), torch.stack(slopes, dim=1)], dim=1)

    train, test = features(train_of(opened)), features(opened.eval)
    means = torch.stack([train[train_of(opened).labels == k].mean(dim=0) for k in range(10)])
    predicted = torch.cdist(test, means).argmin(dim=1)
    assert (predicted.numpy() == opened.eval.labels).mean() > 0.9


def test_large_synthetic_images() -> None:
    data = data_config(source={"type": "synthetic", "image_size": 600, "num_train": 3})
    card = synthetic_card(data.source)
    opened = open_data(data, card, None, no_index, in_channels=3)
    assert train_of(opened).read(2).shape == (3, 600, 600)


# -- holdout and subset ------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=30)
@given(
    num_train=st.integers(20, 300),
    held=st.none() | st.floats(0.01, 0.9),
    fraction=st.none() | st.floats(0.01, 1.0),
    seed=st.integers(0, 9),
)
def test_parts_have_the_sizes_that_submission_counts(
    num_train: int, held: float | None, fraction: float | None, seed: int
) -> None:
    fields: dict[str, Any] = {
        "holdout": held and {"fraction": held, "seed": seed},
        "subset": fraction and {"fraction": fraction, "seed": seed},
    }
    sizes = {"num_train": num_train, "num_eval": 7}
    opened, card = open_synthetic(sizes=sizes, **fields)
    data = data_config(source={"type": "synthetic", "image_size": 16, **sizes}, **fields)
    assert len(train_of(opened)) == num_train_examples(data, card)
    assert len(opened.eval) == num_eval_examples(data, card)


def test_the_holdout_is_disjoint_and_not_a_slice() -> None:
    opened, _ = open_synthetic(holdout={"fraction": 0.25})
    kept, held = names(train_of(opened)), names(opened.eval)
    assert kept.isdisjoint(held)
    assert kept | held == {f"synthetic image {i}" for i in range(200)}
    assert held != {f"synthetic image {i}" for i in range(50)}
    assert held != {f"synthetic image {i}" for i in range(150, 200)}
    assert set(opened.eval.labels) == set(range(10))


def test_a_holdout_of_class_ordered_data_keeps_every_class() -> None:
    """Labels 0..9 in blocks of 20, as in a folder: a slice of the last 10 % would be one class."""
    opened, _ = open_synthetic(holdout={"fraction": 0.25})
    blocks = {int(name.split()[-1]) // 20 for name in names(opened.eval)}
    assert blocks == set(range(10))


def test_another_seed_holds_out_others() -> None:
    held = [names(open_synthetic(holdout={"fraction": 0.1, "seed": seed})[0].eval) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]


def test_a_larger_subset_contains_the_smaller() -> None:
    small, large = (names(train_of(open_synthetic(subset={"fraction": fraction})[0])) for fraction in (0.1, 0.5))
    assert len(small) == 20
    assert small < large


def test_the_subset_leaves_evaluation_alone() -> None:
    opened, _ = open_synthetic(subset={"fraction": 0.1}, holdout={"fraction": 0.25})
    assert (len(train_of(opened)), len(opened.eval)) == (15, 50)
    assert names(train_of(opened)).isdisjoint(names(opened.eval))


def test_a_subset_per_class_is_exact() -> None:
    opened, _ = open_synthetic(subset={"per_class": 7})
    assert np.bincount(train_of(opened).labels).tolist() == [7] * 10
    assert names(train_of(opened)) != names(train_of(open_synthetic(subset={"per_class": 7, "seed": 1})[0]))


def test_a_class_with_too_few_examples_is_named() -> None:
    with pytest.raises(DataError, match=r"per_class is 21, but class 0 has only 20"):
        open_synthetic(subset={"per_class": 21})


def test_a_subset_of_so_many_examples_is_exact_and_grows() -> None:
    small, large = (names(train_of(open_synthetic(subset={"examples": count})[0])) for count in (30, 100))
    assert (len(small), len(large)) == (30, 100)
    assert small < large
    assert small != names(train_of(open_synthetic(subset={"examples": 30, "seed": 1})[0]))


def test_a_holdout_of_the_subset_leaves_the_others_of_it_to_train_on() -> None:
    """VTAB-1k: 800 and 200 of the 1,000 that the final run trains on."""
    whole = names(train_of(open_synthetic(subset={"examples": 100, "seed": 3})[0]))
    parts = {"subset": {"examples": 100, "seed": 3}, "holdout": {"examples": 20, "of": "subset"}}
    opened, card = open_synthetic(**parts)
    kept, held = names(train_of(opened)), names(opened.eval)
    assert (len(kept), len(held)) == (80, 20)
    assert kept | held == whole
    assert kept.isdisjoint(held)
    data = data_config(source={"type": "synthetic", "image_size": 16, "num_train": 200, "num_eval": 50}, **parts)
    assert (num_train_examples(data, card), num_eval_examples(data, card)) == (80, 20)
    alone = open_synthetic(eval_only=True, **parts)[0]
    assert names(alone.eval) == held


def test_parts_read_the_right_images() -> None:
    opened, _ = open_synthetic(holdout={"fraction": 0.25}, subset={"fraction": 0.5})
    whole = train_of(open_synthetic()[0])
    part = train_of(opened)
    together = part.read_many(np.arange(len(part)))
    assert together is not None
    for i in range(len(part)):
        number = int(part.name(i).split()[-1])
        assert torch.equal(part.read(i), whole.read(number))
        assert torch.equal(together[i], whole.read(number))
        assert part.labels[i] == whole.labels[number]


def test_evaluation_alone() -> None:
    assert open_synthetic(eval_only=True)[0].train is None
    held = open_synthetic(eval_only=True, holdout={"fraction": 0.25})[0]
    assert held.train is None
    assert names(held.eval) == names(open_synthetic(holdout={"fraction": 0.25})[0].eval)


# -- refusals ----------------------------------------------------------------------------------------------------------
def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="no split 'validation': expected one of train, test"):
        open_synthetic(eval="validation")


def test_counts_that_contradict_the_card_are_refused() -> None:
    card = synthetic_card(data_config().source)
    with pytest.raises(DataError, match="'train' of data set synthetic holds 3 images here and should hold 1024"):
        check_against_card(array_source(3), card, "train")


@pytest.mark.parametrize("label", [-1, 10, -100])
def test_labels_out_of_range_are_refused(label: int) -> None:
    source = array_source(1024)
    source.labels[17] = label
    with pytest.raises(DataError, match=rf"label {label} of test image 17 .* outside 0..9 \(1 such"):
        check_against_card(source, synthetic_card(data_config().source), "train")
