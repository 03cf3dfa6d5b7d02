"""Makes the index of an image folder, once, when it is registered:

    <root>/<path>/<split>/<class>/…/<image>

Sample numbers, labels and the fingerprint come from this index, so nodes and attempts cannot disagree about them.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from configs.wire import DatasetCard, DatasetIndex, IndexSplit, SplitInfo

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class FolderError(ValueError):
    """The folder cannot be registered as it is. The message names the path and what is wrong with it."""


def scan(root: Path, name: str, path: str) -> DatasetIndex:
    """The index of the images below `root`/`path`, sorted by name. Equal trees give equal fingerprints, wherever they
    lie: it covers relative paths, file sizes and class names, not contents or times.

    Files that are not images by their suffix, and names that start with a dot, are left out and counted. Links are
    followed to files below `root` only.

    Raises:
        FolderError: `path` leaves `root` or is no directory; no splits; a class without images, or not in every split;
            a link to a directory or out of `root`; a file name that is not UTF-8.
    """
    folder = _inside(root, path)
    ignored: Counter[str] = Counter()
    splits = _directories(folder, ignored)
    if not splits:
        raise FolderError(f"{folder} holds no splits: expected directories such as train and test")
    classes_of = {split: _directories(folder / split, ignored) for split in splits}
    class_names = classes_of[splits[0]]
    for split, classes in classes_of.items():
        if not classes:
            raise FolderError(f"split {split} in {folder} holds no classes: expected one directory per class")
        differing = sorted(set(classes) ^ set(class_names))
        if differing:
            raise FolderError(
                f"class {differing[0]} is not in both splits {splits[0]} and {split} of {folder} "
                f"({len(differing)} such classes): every split needs every class"
            )
    parts = tuple(_scan_split(root, folder, split, class_names, ignored) for split in splits)
    return DatasetIndex(
        name=name,
        path=path,
        class_names=tuple(class_names),
        splits=parts,
        fingerprint=_fingerprint(class_names, parts),
        ignored=dict(sorted(ignored.items())),
    )


def card(index: DatasetIndex, index_key: str | None = None) -> DatasetCard:
    """What submission needs to know of an indexed folder; `index_key` says where the index is stored."""
    note = None
    if index.ignored:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in index.ignored.items())
        note = f"{sum(index.ignored.values())} files are not images and were left out: {kinds}"
    return DatasetCard(
        name=index.name,
        type="folder",
        num_classes=len(index.class_names),
        class_names=index.class_names,
        splits=tuple(SplitInfo(name=split.name, num_examples=len(split.paths)) for split in index.splits),
        fingerprint=index.fingerprint,
        index_key=index_key,
        path=index.path,
        note=note,
    )


def _inside(root: Path, path: str) -> Path:
    parts = PurePosixPath(path).parts
    if not path or path.startswith("/") or ".." in parts or "\0" in path:
        raise FolderError(f"path {path!r}: expected a directory below the data root, without '..'")
    folder = root / path
    try:
        is_directory = folder.is_dir()
    except OSError as error:
        # A name that is too long, a folder that may not be looked into.
        raise FolderError(f"path {path[:80]!r} cannot be read: {error.strerror}") from error
    if not is_directory:
        raise FolderError(f"{folder} is not a directory")
    if not folder.resolve().is_relative_to(root.resolve()):
        raise FolderError(f"{folder} is a link out of the data root")
    return folder


def _directories(folder: Path, ignored: Counter[str]) -> list[str]:
    """Names of the directories directly in `folder`, sorted; whatever else is there is counted as ignored."""
    names = []
    for entry in _entries(folder):
        if _is_directory(entry):
            names.append(entry.name)
        else:
            ignored[_kind(entry.name)] += 1
    return names


def _scan_split(root: Path, folder: Path, split: str, class_names: list[str], ignored: Counter[str]) -> IndexSplit:
    real_root = root.resolve()
    images: list[tuple[str, int, int]] = []
    for label, class_name in enumerate(class_names):
        of_class = []
        for path, entry in _files(folder / split / class_name, class_name):
            if _kind(entry.name) not in IMAGE_SUFFIXES:
                ignored[_kind(entry.name)] += 1
                continue
            if entry.is_symlink():
                _refuse_escape(entry, real_root)
            of_class.append((path, label, entry.stat().st_size))
        if not of_class:
            raise FolderError(f"class {class_name} of split {split} in {folder} holds no images")
        images += sorted(of_class)
    paths, labels, sizes = zip(*images, strict=True)
    return IndexSplit(name=split, paths=paths, labels=labels, sizes=sizes)


def _files(folder: Path, relative: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file below `folder`, with its path from the split."""
    for entry in _entries(folder):
        here = f"{relative}/{entry.name}"
        if _is_directory(entry):
            yield from _files(Path(entry.path), here)
        else:
            yield here, entry


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise FolderError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise FolderError(f"{entry.name!a} in {folder} is not UTF-8: rename it") from None
    return entries


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether to descend. Directories that are links could lead out of the root or around in circles."""
    if entry.name.startswith("."):
        return False
    if entry.is_symlink() and entry.is_dir():
        raise FolderError(f"{entry.path} is a link to a directory: only links to files are followed")
    return entry.is_dir()


def _refuse_escape(entry: os.DirEntry[str], real_root: Path) -> None:
    target = Path(entry.path).resolve()
    if not target.is_relative_to(real_root):
        raise FolderError(f"{entry.path} is a link out of the data root, to {target}")
    if not target.is_file():
        raise FolderError(f"{entry.path} is a link to nothing")


def _kind(name: str) -> str:
    """The suffix, lower case, or why there is none to speak of."""
    return "hidden" if name.startswith(".") else Path(name).suffix.lower() or "without suffix"


def _fingerprint(class_names: list[str], splits: tuple[IndexSplit, ...]) -> str:
    digest = hashlib.sha256()
    digest.update("\0".join(["patchwork-folder-1", *class_names]).encode())
    for split in splits:
        digest.update(f"\0\0{split.name}\0".encode())
        for path, size in zip(split.paths, split.sizes, strict=True):
            digest.update(f"{path}\0{size}\0".encode())
    return f"sha256:{digest.hexdigest()}"
