"""What features are probed on: the job's own data, or the data sets that `few_shot` and `neighbours` name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from configs.data import DataConfig, FolderSource
from configs.datasets import card_for
from configs.folder_index import card as card_of_index
from configs.layout import dataset_index_key
from configs.probes import FewShot, Neighbours, ProbeData
from configs.wire import DatasetCard, DatasetIndex
from workers.data.errors import DataError
from workers.data.open import OpenedData, open_data
from workers.data.source import ImageSource
from workers.distributed import Ranks
from workers.probe import MakeLoader, Represent, probe
from workers.store import NotFound

_Asked = TypeVar("_Asked", FewShot, Neighbours)


@dataclass(frozen=True)
class Probe:
    """What is measured on one data set."""

    label: str
    """In the metrics' names; empty: the job's own data."""
    train: ImageSource
    eval: ImageSource
    num_classes: int
    few_shot: FewShot | None
    neighbours: Neighbours | None


def reads_own_training_split(few_shot: FewShot | None, neighbours: Neighbours | None) -> bool:
    """Whether the job's own training images are probed, and not only other data sets."""
    return any(asked is not None and not asked.datasets for asked in (few_shot, neighbours))


def open_probes(
    few_shot: FewShot | None,
    neighbours: Neighbours | None,
    own: OpenedData,
    own_classes: int,
    data: DataConfig,
    data_root: Path | None,
    read: Callable[[str], bytes],
    in_channels: int,
) -> tuple[Probe, ...]:
    """Everything that is to be probed, opened: the job's own data first, then the others in the order they are named.
    A data set that both ask for is opened once.

    Raises:
        DataError: data is missing or is not what it was at submission.
    """
    probes = []
    if reads_own_training_split(few_shot, neighbours):
        assert own.train is not None, "whoever probes the training split opens it"
        probes.append(Probe("", own.train, own.eval, own_classes, _of(few_shot, None), _of(neighbours, None)))
    named = [*(few_shot.datasets if few_shot else ()), *(neighbours.datasets if neighbours else ())]
    for dataset in dict.fromkeys(named):
        card = _card(dataset, read)
        place = {
            "source": dataset.source,
            "train": dataset.train,
            "eval": dataset.eval,
            "subset": None,
            "holdout": None,
        }
        opened = open_data(data.model_copy(update=place), card, data_root, read, in_channels=in_channels)
        assert opened.train is not None
        wanted = _of(few_shot, dataset), _of(neighbours, dataset)
        probes.append(Probe(dataset.label, opened.train, opened.eval, card.num_classes, *wanted))
    return tuple(probes)


def run_probes(
    represent: Represent,
    probes: Iterable[Probe],
    make_loader: MakeLoader,
    data: DataConfig,
    ranks: Ranks,
    keep_going: Callable[[], bool] = lambda: True,
) -> dict[str, float] | None:
    """What `workers.probe.probe` measures on each of them, together; None if told not to go on (collective)."""
    measured: dict[str, float] = {}
    for each in probes:
        found = probe(
            represent,
            each.train,
            each.eval,
            make_loader,
            data,
            each.num_classes,
            each.few_shot,
            each.neighbours,
            ranks,
            keep_going,
            each.label,
        )
        if found is None:
            return None
        measured |= found
    return measured


def _of(asked: _Asked | None, dataset: ProbeData | None) -> _Asked | None:
    """What is asked for, if it is asked of this data set; None: the job's own."""
    if asked is None or (dataset not in asked.datasets if dataset is not None else asked.datasets):
        return None
    return asked


def _card(dataset: ProbeData, read: Callable[[str], bytes]) -> DatasetCard:
    """The card of a data set as it was at submission. Raises DataError."""
    if not isinstance(dataset.source, FolderSource):
        return card_for(dataset.source, {})
    assert dataset.fingerprint is not None, "a resolved job says what its folders hold"
    key = dataset_index_key(dataset.source.name, dataset.fingerprint.removeprefix("sha256:"))
    try:
        return card_of_index(DatasetIndex.model_validate_json(read(key)), key)
    except (NotFound, ValidationError) as error:
        raise DataError(
            f"the index of data set {dataset.source.name} ({key}) is missing or damaged: register the data set again"
        ) from error
