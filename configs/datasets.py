"""What is known of data sets before anything is read: counts, classes, fingerprints.

The torchvision sets have static cards here; folders have one made at registration; synthetic data describes itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from configs.data import (
    AnySource,
    DataConfig,
    FolderSource,
    Holdout,
    ImagesSource,
    Subset,
    SyntheticSource,
    TorchvisionSource,
)
from configs.errors import SpecError, close_matches
from configs.wire import DatasetCard, SplitInfo


def _fingerprint(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _torchvision(name: str, num_classes: int, splits: dict[str, int], class_names: str | None = None) -> DatasetCard:
    return DatasetCard(
        name=name,
        type="torchvision",
        num_classes=num_classes,
        class_names=tuple(class_names.split(",")) if class_names else None,
        splits=tuple(SplitInfo(name=split, num_examples=count) for split, count in splits.items()),
        # The releases behind these names are fixed: the name stands for the bytes, which torchvision checks by MD5.
        fingerprint=_fingerprint(f"torchvision/{name}/1"),
    )


TORCHVISION_CARDS: dict[str, DatasetCard] = {
    card.name: card
    for card in (
        _torchvision(
            "FashionMNIST",
            10,
            {"train": 60_000, "test": 10_000},
            "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot",
        ),
        _torchvision("MNIST", 10, {"train": 60_000, "test": 10_000}, "0,1,2,3,4,5,6,7,8,9"),
        _torchvision(
            "CIFAR10",
            10,
            {"train": 50_000, "test": 10_000},
            "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck",
        ),
        _torchvision("CIFAR100", 100, {"train": 50_000, "test": 10_000}),
        # trainval: train and val together, the 2,040 images papers fine-tune on.
        _torchvision("Flowers102", 102, {"train": 1_020, "val": 1_020, "trainval": 2_040, "test": 6_149}),
        _torchvision("OxfordIIITPet", 37, {"trainval": 3_680, "test": 3_669}),
        _torchvision("ImageNet", 1_000, {"train": 1_281_167, "val": 50_000}),
    )
}


def _planning(name: str, num_classes: int, num_train: int, note: str) -> DatasetCard:
    return DatasetCard(
        name=name,
        type="folder",
        num_classes=num_classes,
        splits=(SplitInfo(name="train", num_examples=num_train),),
        fingerprint=_fingerprint(f"planning/{name}"),
        note=note,
    )


PLANNING_CARDS: dict[str, DatasetCard] = {
    card.name: card
    for card in (
        _planning(
            "imagenet21k",
            21_843,
            14_197_122,
            "Counts of the paper's ImageNet-21k (21,843 classes); releases differ (19,167 to 21,841 classes). "
            "A job needs your own copy, registered under this name.",
        ),
        _planning("jft300m", 18_291, 303_000_000, "JFT-300M is Google's own and not public: this can only be planned."),
    )
}
"""Cards to plan with, by folder name, for data that is not registered. No job can train on them."""


def synthetic_card(source: SyntheticSource) -> DatasetCard:
    """The card of generated images; its fingerprint covers every parameter they depend on."""
    return DatasetCard(
        name="synthetic",
        type="synthetic",
        num_classes=source.num_classes,
        splits=(
            SplitInfo(name="train", num_examples=source.num_train),
            SplitInfo(name="test", num_examples=source.num_eval),
        ),
        fingerprint=_fingerprint(f"synthetic/1/{source.model_dump_json()}"),
    )


def images_card(source: ImagesSource) -> DatasetCard:
    """The card of uploaded images: one split, no classes. An image never changes: its id stands for its bytes."""
    return DatasetCard(
        name="images",
        type="images",
        num_classes=1,
        splits=(SplitInfo(name="test", num_examples=len(source.ids)),),
        fingerprint=_fingerprint(f"images/{','.join(source.ids)}"),
    )


def card_for(source: AnySource, registered: Mapping[str, DatasetCard]) -> DatasetCard:
    """The card of a job's data.

    Args:
        registered: cards of registered folders by name; to plan without data, lay them over PLANNING_CARDS.

    Raises:
        SpecError: at /data/source/name, if a folder is not registered.
    """
    if isinstance(source, TorchvisionSource):
        return TORCHVISION_CARDS[source.name]
    if isinstance(source, SyntheticSource):
        return synthetic_card(source)
    if isinstance(source, ImagesSource):
        return images_card(source)
    assert isinstance(source, FolderSource)
    if source.name in registered:
        return registered[source.name]
    known = ", ".join(sorted(registered)) or "none is registered"
    planned = PLANNING_CARDS.get(source.name)
    note = f" {planned.note}" if planned and planned.note else ""
    hint = close_matches(source.name, registered)
    raise SpecError.at(
        "/data/source/name",
        f"data set {source.name!r} is not registered: register the folder with `patchwork datasets add`.{hint}{note}",
        source.name,
        known,
    )


# -- how many examples a job sees --------------------------------------------------------------------------------------
def num_held_out(num_examples: int, holdout: Holdout) -> int:
    """Examples a holdout takes out of `num_examples`: as many as it says; of a fraction rounded, at least one."""
    if holdout.examples is not None:
        return holdout.examples
    assert holdout.fraction is not None
    return max(1, round(num_examples * holdout.fraction))


def num_in_subset(num_examples: int, fraction: float) -> int:
    """Examples a subset by fraction keeps: rounded, at least one."""
    return max(1, round(num_examples * fraction))


def num_train_examples(data: DataConfig, card: DatasetCard) -> int:
    """Examples trained on: the training split less the holdout, and of what remains the subset; or, with a holdout of
    the subset, the subset less the holdout.

    Raises:
        SpecError: no such split, nothing left by the holdout, or fewer examples than the subset asks for.
    """
    total = _num_examples(card, data.train, "/data/train")
    if data.holdout is None:
        return total if data.subset is None else _num_chosen(total, data.subset, data.train, card)
    if data.holdout.of == "subset":
        assert data.subset is not None, "DataConfig has checked it"
        return _num_kept(_num_chosen(total, data.subset, data.train, card), data.holdout)
    kept = _num_kept(total, data.holdout)
    return kept if data.subset is None else _num_chosen(kept, data.subset, data.train, card)


def num_eval_examples(data: DataConfig, card: DatasetCard) -> int:
    """Examples evaluated on: the held-out part of the training split, or of its subset, if there is a holdout, else the
    eval split.

    Raises:
        SpecError: no such split, or fewer examples than subset and holdout ask for.
    """
    if data.holdout is None:
        return _num_examples(card, data.eval, "/data/eval")
    total = _num_examples(card, data.train, "/data/train")
    if data.holdout.of == "subset":
        assert data.subset is not None, "DataConfig has checked it"
        total = _num_chosen(total, data.subset, data.train, card)
    return total - _num_kept(total, data.holdout)


def _num_kept(total: int, holdout: Holdout) -> int:
    """What a holdout leaves to train on. Raises SpecError if that is nothing."""
    kept = total - num_held_out(total, holdout)
    if kept < 1:
        field = "fraction" if holdout.examples is None else "examples"
        given = getattr(holdout, field)
        raise SpecError.at(
            f"/data/holdout/{field}",
            f"data.holdout.{field} {given} of {total} examples leaves none to train on",
            given,
        )
    return kept


def _num_chosen(total: int, subset: Subset, split: str, card: DatasetCard) -> int:
    """What a subset takes of `total` examples. Raises SpecError if it asks for more."""
    if subset.fraction is not None:
        return num_in_subset(total, subset.fraction)
    if subset.examples is not None:
        wanted, field, allowed = subset.examples, "examples", total
        asked = f"data.subset.examples {wanted}"
    else:
        assert subset.per_class is not None
        wanted, field, allowed = subset.per_class * card.num_classes, "per_class", total // card.num_classes
        asked = f"data.subset.per_class {subset.per_class} of {card.num_classes} classes is {wanted} examples"
    if wanted > total:
        message = f"{asked}, split {split!r} has {total}"
        raise SpecError.at(f"/data/subset/{field}", message, getattr(subset, field), f"at most {allowed}")
    return wanted


def _num_examples(card: DatasetCard, split: str, pointer: str) -> int:
    try:
        return card.num_examples(split)
    except KeyError:
        names = ", ".join(info.name for info in card.splits)
        field = pointer[1:].replace("/", ".")
        raise SpecError.at(
            pointer, f"{field} {split!r}: data set {card.name} has no such split, it has {names}", split, names
        ) from None
