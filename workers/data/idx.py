"""MNIST and Fashion-MNIST: four files in the idx format (yann.lecun.com/exdb/mnist), plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.data.errors import DataError

_PREFIX = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTES = 0x08


def find_idx_files(directory: Path, split: str) -> tuple[Path, Path] | None:
    """The image and label file of `split` in `directory`, plain before gzipped; None unless both are there."""
    found = []
    for part in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        name = f"{_PREFIX[split]}-{part}"
        there = [path for path in (directory / name, directory / f"{name}.gz") if path.is_file()]
        if not there:
            return None
        found.append(there[0])
    return found[0], found[1]


def read_idx_pair(images_path: Path, labels_path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 (n, 1, H, W) and labels int64 (n,).

    Raises:
        DataError: a file is damaged, or the two do not belong together.
    """
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} holds {len(images)} images and {labels_path} {len(labels)} labels")
    return images[:, None], labels.astype(np.int64)


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The array of unsigned bytes in `path`, read-only.

    Raises:
        DataError: not such a file, truncated, or followed by more.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): it is damaged or incomplete; replace it") from error
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes([0, 0, _UNSIGNED_BYTES, ndim]):
        raise DataError(f"{path} is not an idx file of {ndim} dimensions of unsigned bytes; replace it")
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=ndim, offset=4))
    expected = header + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise DataError(f"{path} holds {len(content)} bytes and should hold {expected}: it is incomplete; replace it")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
