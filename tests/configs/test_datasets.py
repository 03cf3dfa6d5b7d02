from __future__ import annotations

from typing import get_args

import pytest

from configs.data import FolderSource, SyntheticSource, TorchvisionName, TorchvisionSource
from configs.datasets import PLANNING_CARDS, TORCHVISION_CARDS, card_for, synthetic_card
from configs.errors import SpecError
from tests.configs.specs import CARD


def test_every_torchvision_set_has_a_card() -> None:
    assert set(TORCHVISION_CARDS) == set(get_args(TorchvisionName))
    assert len({card.fingerprint for card in TORCHVISION_CARDS.values()}) == len(TORCHVISION_CARDS)


@pytest.mark.parametrize("card", TORCHVISION_CARDS.values(), ids=lambda c: c.name)
def test_class_names_are_as_many_as_classes(card: object) -> None:
    assert card.class_names is None or len(card.class_names) == card.num_classes  # type: ignore[attr-defined]


def test_trainval_is_train_and_val() -> None:
    flowers = TORCHVISION_CARDS["Flowers102"]
    parts = flowers.num_examples("train") + flowers.num_examples("val")
    assert flowers.num_examples("trainval") == parts == 2040


def test_cards_are_found_by_source() -> None:
    assert card_for(TorchvisionSource(type="torchvision", name="CIFAR100"), {}).num_classes == 100
    assert card_for(FolderSource(type="folder", name="pictures"), {"pictures": CARD}) == CARD


def test_a_folder_that_is_not_registered_is_refused_with_the_next_step() -> None:
    with pytest.raises(SpecError) as caught:
        card_for(FolderSource(type="folder", name="picture"), {"pictures": CARD})
    (error,) = caught.value.errors
    assert error.pointer == "/data/source/name"
    assert "patchwork datasets add" in error.message
    assert "Did you mean pictures" in error.message


def test_planning_cards_are_no_registration() -> None:
    source = FolderSource(type="folder", name="jft300m")
    assert card_for(source, PLANNING_CARDS).num_classes == 18_291
    with pytest.raises(SpecError, match="not public"):
        card_for(source, {})


def test_a_synthetic_card_covers_its_parameters() -> None:
    first = synthetic_card(SyntheticSource(type="synthetic", num_train=8, num_eval=4, num_classes=3))
    assert (first.num_examples("train"), first.num_examples("test"), first.num_classes) == (8, 4, 3)
    other = synthetic_card(SyntheticSource(type="synthetic", num_train=8, num_eval=4, num_classes=3, image_size=8))
    assert first.fingerprint != other.fingerprint
    again = synthetic_card(SyntheticSource(type="synthetic", num_train=8, num_eval=4, num_classes=3))
    assert first == again
