"""Registered image folders: read by the index made at registration, which fixes sample numbers and labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
from pydantic import ValidationError

from configs.wire import DatasetCard, DatasetIndex
from workers.data.errors import DataError
from workers.data.files import FileSource


def open_folder(
    card: DatasetCard, split: str, data_root: Path | None, read_index: Callable[[str], bytes], channels: int
) -> FileSource:
    """The images of `split`, read from <data root>/<card.path>/<split>; files whose size changed are unreadable.

    Raises:
        DataError: no data root, no such directory or split, or an index that is damaged or of other data.
    """
    if data_root is None:
        raise DataError(
            f"data set {card.name} lies under the node's data root, which is not set: set PATCHWORK_DATA_ROOT "
            "(data_root in the node file) to the directory that holds data sets"
        )
    index = _load_index(card, read_index)
    part = next((part for part in index.splits if part.name == split), None)
    if part is None:
        known = ", ".join(part.name for part in index.splits)
        raise DataError(f"data set {card.name} has no split {split!r}: expected one of {known}")
    directory = data_root / index.path / split
    if not directory.is_dir():
        raise DataError(
            f"data set {card.name} ({split}) was not found in {directory}: copy it to this node, or mount it there"
        )
    for path in (f"{index.path}/{split}", *part.paths):
        # Taken apart only if need be: an index may name 14 million files.
        if path.startswith("/") or (".." in path and ".." in PurePosixPath(path).parts):
            raise DataError(f"the index of data set {card.name} names a file outside it: {path!r}")
    return FileSource(directory, part.paths, np.array(part.labels, dtype=np.int64), channels, part.sizes)


def _load_index(card: DatasetCard, read_index: Callable[[str], bytes]) -> DatasetIndex:
    again = "register the data set again"
    if card.index_key is None:
        raise DataError(f"data set {card.name} has no index: {again}")
    try:
        index = DatasetIndex.model_validate_json(read_index(card.index_key))
    except ValidationError as error:
        raise DataError(f"the index of data set {card.name} ({card.index_key}) is damaged: {again}") from error
    if index.fingerprint != card.fingerprint:
        raise DataError(
            f"the index of data set {card.name} has fingerprint {index.fingerprint} and the job was submitted with "
            f"{card.fingerprint}: {again}"
        )
    if any(not len(part.paths) == len(part.labels) == len(part.sizes) for part in index.splits):
        raise DataError(f"the index of data set {card.name} ({card.index_key}) is damaged: {again}")
    return index
