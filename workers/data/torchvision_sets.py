"""The torchvision data sets, where the node keeps them:

<data root>/fashion-mnist/*.gz          as in Debian's package dataset-fashion-mnist, which is found by itself too
<data root>/torchvision/                torchvision's own layout, where downloads go:
    FashionMNIST/raw/, MNIST/raw/, cifar-10-batches-py/, cifar-100-python/, flowers-102/, oxford-iiit-pet/
    imagenet/{train,val}/<wnid>/*.JPEG  extracted by the operator, never downloaded
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torchvision import datasets

from configs.data import TorchvisionSource
from workers.data.errors import DataError
from workers.data.files import FileSource
from workers.data.idx import find_idx_files, read_idx_pair
from workers.data.source import ArraySource, ImageSource

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_MISSING = (RuntimeError, FileNotFoundError)
_SET_ROOT = "set PATCHWORK_DATA_ROOT (data_root in the node file) to the directory that holds data sets"
Found = TypeVar("Found")


def open_torchvision(
    source: TorchvisionSource,
    split: str,
    data_root: Path | None,
    channels: int,
    *,
    sets: Any = datasets,
    system_dir: Path = DEBIAN_FASHION_MNIST,
) -> ImageSource:
    """The images of `split` (one that its card names), downloaded first if need be and allowed. `sets` offers
    torchvision's classes by name; `system_dir` is where the system's package keeps Fashion-MNIST.

    Raises:
        DataError: missing and not to be downloaded, or the download failed; damaged.
    """
    if source.name in ("FashionMNIST", "MNIST"):
        return _open_mnist(source, split, data_root, channels, sets, system_dir)
    root = _torchvision_root(source, data_root)
    if source.name == "ImageNet":
        return _open_imagenet(root / "imagenet", split, channels)
    if source.name in ("CIFAR10", "CIFAR100"):
        cifar = _open_set(source, root, sets, train=split == "train")
        images = np.ascontiguousarray(cifar.data.transpose(0, 3, 1, 2))
        return ArraySource(source.name, images, np.array(cifar.targets, dtype=np.int64), channels)
    both = ("train", "val") if (source.name, split) == ("Flowers102", "trainval") else (split,)
    parts = [_open_set(source, root, sets, split=part) for part in both]
    # Flowers102 and OxfordIIITPet call the list of their files differently.
    files = [path for part in parts for path in getattr(part, "_image_files", None) or part._images]
    labels = [label for part in parts for label in part._labels]
    paths = [str(Path(path).relative_to(root)) for path in files]
    return FileSource(root, paths, np.array(labels, dtype=np.int64), channels)


def _open_mnist(
    source: TorchvisionSource, split: str, data_root: Path | None, channels: int, sets: Any, system_dir: Path
) -> ImageSource:
    is_fashion = source.name == "FashionMNIST"
    directories = [system_dir] if is_fashion else []
    if data_root is not None:
        own = data_root / ("fashion-mnist" if is_fashion else "mnist")
        directories = [own, data_root / "torchvision" / source.name / "raw", *directories]

    def find() -> tuple[Path, Path]:
        for directory in directories:
            pair = find_idx_files(directory, split)
            if pair is not None:
                return pair
        raise FileNotFoundError

    hint = "install the Debian package dataset-fashion-mnist, or " if is_fashion else ""
    pair = _find_or_download(source, data_root, directories, find, sets, hint)
    return ArraySource(source.name, *read_idx_pair(*pair), channels)


def _open_imagenet(root: Path, split: str, channels: int) -> ImageSource:
    directory = root / split
    if not directory.is_dir():
        raise DataError(
            f"ImageNet ({split}) was not found in {directory}: extract its archive there as <wnid>/<image>.JPEG "
            "(torchvision.datasets.ImageNet does that); it is never downloaded"
        )
    try:
        folder = datasets.ImageFolder(str(directory))
    except FileNotFoundError as error:
        raise DataError(f"ImageNet in {directory} is incomplete: {error}") from error
    paths = [str(Path(path).relative_to(directory)) for path, _ in folder.samples]
    return FileSource(directory, paths, np.array(folder.targets, dtype=np.int64), channels)


def _torchvision_root(source: TorchvisionSource, data_root: Path | None) -> Path:
    if data_root is None:
        raise DataError(f"{source.name} is looked for under the node's data root, which is not set: {_SET_ROOT}")
    return data_root / "torchvision"


def _open_set(source: TorchvisionSource, root: Path, sets: Any, **split: Any) -> Any:
    """torchvision's object for the set, which checks that its files are there (CIFAR, Flowers102: by MD5)."""

    def find() -> Any:
        return getattr(sets, source.name)(str(root), **split)

    return _find_or_download(source, root.parent, [root], find, sets, "put it there in torchvision's layout, or ")


def _find_or_download(
    source: TorchvisionSource,
    data_root: Path | None,
    directories: Sequence[Path],
    find: Callable[[], Found],
    sets: Any,
    hint: str,
) -> Found:
    """What `find` returns, after a download if it finds nothing (raises _MISSING) and may."""
    try:
        return find()
    except _MISSING:
        looked = ", ".join(map(str, directories)) or "nowhere"
        reason = f"{source.name} was not found, or is incomplete (looked in: {looked})"
    if data_root is None:
        raise DataError(f"{reason}: {hint}{_SET_ROOT}")
    if source.download == "never":
        raise DataError(f"{reason}: {hint}set data.source.download: auto")
    root = _torchvision_root(source, data_root)
    try:
        with _node_lock(root):
            try:
                return find()  # Another process fetched it while this one waited for the lock.
            except _MISSING:
                _download(source, root, sets)
            return find()
    except (RuntimeError, OSError, ValueError, HTTPException) as error:
        raise DataError(
            f"{reason} and could not be downloaded ({type(error).__name__}: {error}): "
            f"{hint}let this node reach the internet"
        ) from error


def _download(source: TorchvisionSource, root: Path, sets: Any) -> None:
    """Fetch the set aside and move it into place, so that a download cut short is never taken for the set."""
    incoming = root / f".incoming-{source.name}"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir()
    getattr(sets, source.name)(str(incoming), download=True)
    for fetched in incoming.iterdir():
        fetched.rename(root / fetched.name)
    incoming.rmdir()


@contextmanager
def _node_lock(directory: Path) -> Iterator[None]:
    """Held by one process of this node at a time; freed by the kernel if the process dies."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".patchwork-download.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
