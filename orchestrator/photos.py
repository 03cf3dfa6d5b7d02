"""A user's folder of photos: what lies in it, and how it comes under the data root.

photos/<class>/<image>              classes only: a part is held out for evaluation
photos/<split>/<class>/<image>      splits named train and val (or test)
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.folder_index import IMAGE_SUFFIXES
from orchestrator.connection import PatchworkError

VALIDATION = ("val", "valid", "validation")
_SPLITS = ("train", "training", *VALIDATION, "test")


class PhotosError(PatchworkError):
    """The folder is no folder of classes."""


@dataclass(frozen=True)
class Photos:
    """A folder of class folders, with or without splits."""

    folder: Path
    files: dict[str, dict[str, list[Path]]]
    """Split -> class -> images. Without splits there is one, `train`."""
    has_splits: bool

    @property
    def train(self) -> str:
        return next(split for split in self.files if split.startswith("train"))

    @property
    def validation(self) -> str | None:
        return next((split for split in VALIDATION if split in self.files), None)

    @property
    def classes(self) -> list[str]:
        return sorted(self.files[self.train])

    def num_images(self, split: str) -> int:
        return sum(map(len, self.files[split].values()))

    @property
    def name(self) -> str:
        """A name for the data set that changes when any file does."""
        digest = hashlib.sha256()
        for split, classes in sorted(self.files.items()):
            for images in classes.values():
                for image in images:
                    status = image.stat()
                    digest.update(f"{split}\0{image}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        slug = re.sub(r"[^a-z0-9]+", "-", self.folder.resolve().name.lower()).strip("-")[:40] or "photos"
        return f"{slug}-{digest.hexdigest()[:8]}"


def look(folder: Path) -> Photos:
    """What lies in the folder.

    Raises:
        PhotosError: it is no directory, or holds no classes, one class, an empty one, or splits that differ.
    """
    if not folder.is_dir():
        raise PhotosError(f"{folder} is not a directory: expected FOLDER/<class>/<image>")
    folder = folder.absolute()
    names = [path.name for path in _directories(folder)]
    has_splits = any(name in ("train", "training") for name in names)
    splits = [name for name in names if name in _SPLITS] if has_splits else ["train"]
    files = {split: _classes(folder / split if has_splits else folder) for split in splits}
    photos = Photos(folder, files, has_splits)
    classes = photos.classes
    if len(classes) < 2:
        found = f"one class, {classes[0]}" if classes else "no class folders"
        raise PhotosError(f"{folder} holds {found}: expected FOLDER/<class>/<image> with two classes or more")
    for split, of_split in files.items():
        differing = sorted(set(of_split) ^ set(classes))
        if differing:
            raise PhotosError(f"class {differing[0]} is not in both {photos.train} and {split} of {folder}")
        for name, images in of_split.items():
            if not images:
                raise PhotosError(f"class {name} in {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return photos


def bring_under(photos: Photos, data_root: Path) -> str:
    """Have the photos under the data root, as <split>/<class>/<image>; returns the path there. A folder that lies there
    already stays as it is; of another one hard links are made, or copies where the file system does not allow them.

    Raises:
        PhotosError: the data root cannot be written.
    """
    real_root = data_root.resolve()
    if photos.has_splits and photos.folder.resolve().is_relative_to(real_root):
        return photos.folder.resolve().relative_to(real_root).as_posix()
    path = f"photos/{photos.name}"
    target = real_root / path
    if target.is_dir():
        return path
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        for split, classes in photos.files.items():
            for images in classes.values():
                base = photos.folder / split if photos.has_splits else photos.folder
                for image in images:
                    _link(image, partial / split / image.relative_to(base))
        partial.replace(target)
    except OSError as error:
        raise PhotosError(f"{target}: cannot bring the images under the data root: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _link(image: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    real = image.resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def _classes(folder: Path) -> dict[str, list[Path]]:
    return {path.name: sorted(_images(path)) for path in _directories(folder)}


def _directories(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(parent) / name
