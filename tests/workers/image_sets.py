"""Small image sources and files for the tests of the data path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.data import DataConfig
from workers.data.errors import UnreadableImage
from workers.data.order import Indices
from workers.data.source import ArraySource


def data_config(**fields: Any) -> DataConfig:
    """A DataConfig on synthetic images, unless told otherwise."""
    return DataConfig.model_validate({"source": {"type": "synthetic"}, **fields})


def random_images(num_images: int, channels: int = 1, height: int = 12, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_images, channels, height, width), dtype=np.uint8)


def array_source(num_images: int, channels: int = 1, num_classes: int = 3, side: int = 12) -> ArraySource:
    labels = np.arange(num_images, dtype=np.int64) % num_classes
    return ArraySource("test", random_images(num_images, channels, side, side), labels, channels)


class DecodedSource:
    """An ImageSource whose images must be read one by one; those at `broken` cannot be."""

    def __init__(self, images: np.ndarray, labels: Indices, broken: Sequence[int] = ()) -> None:
        self.labels = labels
        self.channels = images.shape[1]
        self.broken = set(broken)
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"image-{index}.png"

    def read(self, index: int) -> Tensor:
        if index in self.broken:
            raise UnreadableImage("truncated")
        return torch.from_numpy(self._images[index].copy())

    def read_many(self, indices: Indices) -> None:
        return None


def decoded_source(
    num_images: int, channels: int = 1, broken: Sequence[int] = (), num_classes: int = 3
) -> DecodedSource:
    """The images of `array_source`, read one by one."""
    labels = np.arange(num_images, dtype=np.int64) % num_classes
    return DecodedSource(random_images(num_images, channels), labels, broken)


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3); the suffix says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_folder(root: Path, splits: dict[str, int], classes: Sequence[str] = ("cat", "dog"), side: int = 8) -> None:
    """An image folder below `root` with so many PNG files per class in each split."""
    rng = np.random.default_rng(0)
    for split, per_class in splits.items():
        for name in classes:
            for i in range(per_class):
                write_image(root / split / name / f"{i:03d}.png", rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
