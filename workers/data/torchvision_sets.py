"""The torchvision data sets, where the node keeps them:

<data root>/fashion-mnist/*.gz          as in Debian's package dataset-fashion-mnist, which is found by itself too
<data root>/torchvision/                torchvision's own layout, where downloads go:
    FashionMNIST/raw/, MNIST/raw/, cifar-10-batches-py/, cifar-100-python/, flowers-102/, oxford-iiit-pet/
    imagenet/{train,val}/<wnid>/*.JPEG  extracted by the operator, never downloaded
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from configs.data import TorchvisionSource
from workers.data.errors import DataError
from workers.data.files import FileSource
from workers.data.idx import find_idx_files, read_idx_pair
from workers.data.source import ArraySource, ImageSource

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SPLITS = {
    "FashionMNIST": ("train", "test"),
    "MNIST": ("train", "test"),
    "CIFAR10": ("train", "test"),
    "CIFAR100": ("train", "test"),
    "Flowers102": ("train", "val", "trainval", "test"),
    "OxfordIIITPet": ("trainval", "test"),
    "ImageNet": ("train", "val"),
}


def open_torchvision(
    source: TorchvisionSource, split: str, data_root: Path | None, channels: int, *, sets: Any = datasets
) -> ImageSource:
    """The images of `split`, downloaded first if need be and allowed. `sets` offers torchvision's classes by name.

    Raises:
        DataError: no such split; missing and not to be downloaded, or the download failed; damaged.
    """
    if split not in SPLITS[source.name]:
        raise DataError(f"{source.name} has no split {split!r}: expected one of {', '.join(SPLITS[source.name])}")
    if source.name in ("FashionMNIST", "MNIST"):
        system = [DEBIAN_FASHION_MNIST] if source.name == "FashionMNIST" else []
        return open_mnist(source, split, data_root, channels, system_dirs=system, sets=sets)
    if data_root is None:
        raise DataError(f"{source.name} is looked for under the node's data root, which is not set: {_SET_ROOT}")
    root = data_root / "torchvision"
    if source.name == "ImageNet":
        return _open_imagenet(root / "imagenet", split, channels)
    if source.name in ("CIFAR10", "CIFAR100"):
        make = lambda download: getattr(sets, source.name)(str(root), train=split == "train", download=download)  # noqa: E731
        cifar = _open_or_download(make, source, root)
        images = np.ascontiguousarray(cifar.data.transpose(0, 3, 1, 2))
        return ArraySource(source.name, images, np.array(cifar.targets, dtype=np.int64), channels)
    parts = ("train", "val") if (source.name, split) == ("Flowers102", "trainval") else (split,)
    paths: list[str] = []
    labels: list[int] = []
    for part in parts:
        make = lambda download, part=part: getattr(sets, source.name)(str(root), split=part, download=download)  # noqa: E731
        part_set = _open_or_download(make, source, root)
        paths += [str(path.relative_to(root)) for path in map(Path, _image_files(part_set))]
        labels += list(part_set._labels)
    return FileSource(root, paths, np.array(labels, dtype=np.int64), channels)


_SET_ROOT = "set PATCHWORK_DATA_ROOT (data_root in the node file) to the directory that holds data sets"


def _image_files(dataset: Any) -> list[Any]:
    """The paths a torchvision data set keeps (Flowers102 and OxfordIIITPet name them differently)."""
    files: list[Any] = dataset._image_files if hasattr(dataset, "_image_files") else dataset._images
    return files


def open_mnist(
    source: TorchvisionSource,
    split: str,
    data_root: Path | None,
    channels: int,
    *,
    system_dirs: list[Path],
    sets: Any = datasets,
) -> ImageSource:
    """MNIST or Fashion-MNIST from the data root, `system_dirs`, or a download. Raises DataError as open_torchvision."""
    own = [data_root / source.name.lower().replace("fashionmnist", "fashion-mnist")] if data_root else []
    raw = [data_root / "torchvision" / source.name / "raw"] if data_root else []
    directories = own + raw + system_dirs
    found = next((pair for directory in directories if (pair := find_idx_files(directory, split))), None)
    if found is None:
        looked = ", ".join(map(str, directories)) or "nowhere, as the data root is not set"
        hint = "install the Debian package dataset-fashion-mnist, or " if source.name == "FashionMNIST" else ""
        if data_root is None or source.download == "never":
            how = "set data.source.download: auto" if data_root else _SET_ROOT
            raise DataError(
                f"{source.name} ({split}) was not found (looked in: {looked}): {hint}put its four idx files there, or {how}"
            )
        root = data_root / "torchvision"
        _download(lambda: getattr(sets, source.name)(str(root), download=True), source, looked, hint)
        found = find_idx_files(raw[0], split)
        if found is None:
            raise DataError(f"the download of {source.name} left no {split} files in {raw[0]}")
    return ArraySource(source.name, *read_idx_pair(*found), channels)


def _open_or_download(make: Callable[[bool], Any], source: TorchvisionSource, root: Path) -> Any:
    """The data set as it lies below `root`; downloaded once if it is not there."""
    try:
        return make(False)
    except (RuntimeError, FileNotFoundError) as missing:
        if source.download == "never":
            raise DataError(
                f"{source.name} was not found, or is incomplete, in {root} ({missing}): put it there in torchvision's "
                "layout, or set data.source.download: auto"
            ) from missing
    return _download(lambda: make(True), source, str(root), "")


def _download(fetch: Callable[[], Any], source: TorchvisionSource, looked: str, hint: str) -> Any:
    """What `fetch` returns. One process of the node downloads, the others wait for it and find the files."""
    try:
        return fetch()
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"{source.name} was not found (looked in: {looked}) and could not be downloaded "
            f"({type(error).__name__}: {error}): {hint}put its files there, or allow this node to reach the internet"
        ) from error


@contextmanager
def node_lock(directory: Path) -> Iterator[None]:
    """Held by one process of this node at a time; freed by the kernel if the process dies."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".patchwork-download.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_imagenet(root: Path, split: str, channels: int) -> ImageSource:
    directory = root / split
    if not directory.is_dir():
        raise DataError(
            f"ImageNet ({split}) was not found in {directory}: extract the archive there as {split}/<wnid>/<image>.JPEG "
            "(torchvision.datasets.ImageNet does that); it is never downloaded"
        )
    try:
        folder = datasets.ImageFolder(str(directory))
    except FileNotFoundError as error:
        raise DataError(f"ImageNet in {directory} is incomplete: {error}") from error
    paths = [str(Path(path).relative_to(directory)) for path, _ in folder.samples]
    return FileSource(directory, paths, np.array([label for _, label in folder.samples], dtype=np.int64), channels)
