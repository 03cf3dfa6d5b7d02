"""Reassessed labels (Beyer et al. 2020, "Are we done with ImageNet?"): several right classes for an image, or none.

The file is that of google-research/reassessed-imagenet, `real.json`: a list with a list of classes for each image, in
the order of ImageNet's validation images, ILSVRC2012_val_00000001 first.

    n  images     m  most labels of an image
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from workers.data.errors import DataError
from workers.data.source import ImageSource

NO_LABEL = -1
MAX_BYTES = 256 * 1024 * 1024
MAX_LABELS = 1000
"""Of an image; ImageNet's have up to a few dozen."""
_NUMBERED = re.compile(r"ILSVRC2012_val_([0-9]{8})\.[A-Za-z]+$")


def read_real_labels(name: str, data_root: Path | None, images: ImageSource, num_classes: int) -> Tensor:
    """The right classes of each image, int64 (n, m), filled up with NO_LABEL: an image without labels has none.

    An image that is named as ImageNet's validation images are is looked up by its number, whatever order the images
    lie in; a split without such names has an entry for each image, in its own order.

    Args:
        name: the file, relative to `data_root`.

    Raises:
        DataError: the file is missing, is not such a list, or does not fit these images; says what is wrong where.
    """
    if data_root is None:
        raise DataError(f"real_labels {name!r} lies under the node's data root, which is not set: PATCHWORK_DATA_ROOT")
    path = data_root / name
    if not path.resolve().is_relative_to(data_root.resolve()):
        raise DataError(f"real_labels {name!r} is a link out of the data root {data_root}")
    listed = _parse(path)
    _check(listed, path, num_classes)
    entries = _entries_of(images, len(listed), path)
    most = max((len(listed[entry]) for entry in entries), default=0)
    labels = torch.full((len(images), max(most, 1)), NO_LABEL, dtype=torch.int64)
    for index, entry in enumerate(entries):
        found = listed[entry]
        labels[index, : len(found)] = torch.tensor(found, dtype=torch.int64)
    if not (labels != NO_LABEL).any():
        raise DataError(f"{path}: no image has a label there")
    return labels


def _parse(path: Path) -> list[list[int]]:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path} has {size} bytes, at most {MAX_BYTES} are read")
        listed = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"real_labels: {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(listed, list):
        raise DataError(f"{path}: expected a list with a list of classes for each image, got {type(listed).__name__}")
    return listed


def _check(listed: list[list[int]], path: Path, num_classes: int) -> None:
    for index, labels in enumerate(listed):
        if not isinstance(labels, list):
            raise DataError(f"{path}: entry {index} is {str(labels)[:40]!r}, expected a list of classes")
        if len(labels) > MAX_LABELS:
            raise DataError(f"{path}: entry {index} names {len(labels)} classes, at most {MAX_LABELS} are read")
        for label in labels:
            # bool is an int to Python.
            if type(label) is not int or not 0 <= label < num_classes:
                raise DataError(
                    f"{path}: entry {index} names class {str(label)[:40]!r}, expected 0 to {num_classes - 1}"
                )


def _entries_of(images: ImageSource, num_entries: int, path: Path) -> list[int]:
    """The place in the file of each image."""
    matches = [_NUMBERED.search(images.name(index)) for index in range(len(images))]
    named = [match for match in matches if match is not None]
    if not named:
        if num_entries != len(images):
            raise DataError(f"{path} has {num_entries} entries, the split has {len(images)} images")
        return list(range(len(images)))
    if len(named) < len(images):
        other = images.name(next(index for index, match in enumerate(matches) if match is None))
        raise DataError(f"{path}: {other} is not named as ImageNet's validation images, {named[0][0]} is")
    numbers = [int(match[1]) for match in named]
    wrong = next((index for index, number in enumerate(numbers) if not 1 <= number <= num_entries), None)
    if wrong is not None:
        raise DataError(f"{path} has {num_entries} entries, none for {images.name(wrong)}")
    return [number - 1 for number in numbers]
