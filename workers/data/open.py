"""Opens the data of a job: finds the source, checks it against its card, applies holdout and subset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.data import DataConfig, FolderSource, Holdout, ImagesSource, Subset, SyntheticSource, TorchvisionSource
from configs.datasets import num_held_out, num_in_subset
from configs.wire import DatasetCard
from workers.data.errors import DataError
from workers.data.folder import open_folder
from workers.data.images import UploadedImages
from workers.data.order import Indices
from workers.data.random_bits import Bits, Stream, random_bits
from workers.data.source import ImageSource, Selection
from workers.data.synthetic import SyntheticImages
from workers.data.torchvision_sets import open_torchvision


@dataclass(frozen=True)
class OpenedData:
    train: ImageSource | None
    """None if only the evaluation split was asked for."""
    eval: ImageSource
    class_names: tuple[str, ...] | None


def open_data(
    data: DataConfig,
    card: DatasetCard,
    data_root: Path | None,
    read_object: Callable[[str], bytes],
    *,
    in_channels: int,
    eval_only: bool = False,
) -> OpenedData:
    """The training and evaluation images of a job, as `in_channels` channels.

    With a holdout, evaluation is on the held-out part of the training split. The subset is taken of what remains, or,
    with a holdout of the subset, before it.
    `read_object(key)` fetches from the object store: a registered folder's index, uploaded images.

    Raises:
        DataError: the data is missing or is not what the card says; the message names it, says where it was looked
            for and what to do.
    """

    def open_split(split: str) -> ImageSource:
        if split not in [info.name for info in card.splits]:
            known = ", ".join(info.name for info in card.splits)
            raise DataError(f"data set {card.name} has no split {split!r}: expected one of {known}")
        source = _open_split(data, card, split, data_root, read_object, in_channels)
        if not isinstance(data.source, ImagesSource):  # which have no labels
            check_against_card(source, card, split)
        return source

    if data.holdout is None:
        evaluated = open_split(data.eval)
        train = None if eval_only else open_split(data.train)
    else:
        whole = open_split(data.train)
        if data.holdout.of == "subset":
            assert data.subset is not None, "DataConfig has checked it"
            whole = Selection(whole, _subset(whole.labels, card.num_classes, data.subset))
        kept, held_out = _hold_out(len(whole), data.holdout)
        evaluated, train = Selection(whole, held_out), Selection(whole, kept)
    if train is not None and data.subset is not None and (data.holdout is None or data.holdout.of == "split"):
        train = Selection(train, _subset(train.labels, card.num_classes, data.subset))
    return OpenedData(None if eval_only else train, evaluated, card.class_names)


def _open_split(
    data: DataConfig,
    card: DatasetCard,
    split: str,
    data_root: Path | None,
    read_object: Callable[[str], bytes],
    channels: int,
) -> ImageSource:
    source = data.source
    if isinstance(source, SyntheticSource):
        return SyntheticImages(source, split, channels)
    if isinstance(source, TorchvisionSource):
        return open_torchvision(source, split, data_root, channels)
    if isinstance(source, ImagesSource):
        return UploadedImages(source.ids, read_object, channels)
    assert isinstance(source, FolderSource)
    return open_folder(card, split, data_root, read_object, channels)


def check_against_card(source: ImageSource, card: DatasetCard, split: str) -> None:
    """Refuse counts and labels that contradict the card: training would be on other data than was submitted."""
    expected = card.num_examples(split)
    if len(source) != expected:
        raise DataError(
            f"split {split!r} of data set {card.name} holds {len(source)} images here and should hold {expected}: "
            "it is incomplete or another data set; delete it and fetch it again"
        )
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= card.num_classes))
    if wrong.size:
        raise DataError(
            f"label {source.labels[wrong[0]]} of {source.name(int(wrong[0]))} ({split}) of data set {card.name} "
            f"is outside 0..{card.num_classes - 1} ({wrong.size} such labels)"
        )


def _hold_out(num_examples: int, holdout: Holdout) -> tuple[Indices, Indices]:
    """The indices to train on and those held out, each ascending; chosen by random keys, never by slice."""
    num_held = num_held_out(num_examples, holdout)
    chosen = _by_random_key(random_bits(Stream.HOLDOUT, holdout.seed, np.arange(num_examples)))
    return np.sort(chosen[num_held:]), np.sort(chosen[:num_held])


def _subset(labels: Indices, num_classes: int, subset: Subset) -> Indices:
    """The indices of the subset, ascending. A larger fraction of one seed contains the smaller ones."""
    chosen = _by_random_key(random_bits(Stream.SUBSET, subset.seed, np.arange(len(labels))))
    if subset.fraction is not None:
        return np.sort(chosen[: num_in_subset(len(labels), subset.fraction)])
    if subset.examples is not None:
        return np.sort(chosen[: subset.examples])
    assert subset.per_class is not None
    counts = np.bincount(labels, minlength=num_classes)
    if counts.min() < subset.per_class:
        poorest = int(counts.argmin())
        raise DataError(
            f"data.subset.per_class is {subset.per_class}, but class {poorest} has only {counts[poorest]} examples"
        )
    by_class = chosen[np.argsort(labels[chosen], kind="stable")]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.sort(by_class[(starts[:, None] + np.arange(subset.per_class)).reshape(-1)])


def _by_random_key(keys: Bits) -> Indices:
    return np.argsort(keys, kind="stable").astype(np.int64)
