"""Where images come from: the seam between data sets and the loader, and the sources that lie in memory."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.data.order import Indices

UNKNOWN_LABEL = -1
"""Of an image of which nobody said what it shows."""


class ImageSource(Protocol):
    """Numbered images with labels. `read` is called from several threads."""

    @property
    def labels(self) -> Indices:
        """The label of every image, int64 (n,); UNKNOWN_LABEL where it has none."""
        ...

    @property
    def channels(self) -> int:
        """Of every image: 1 or 3."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call this image in a message."""
        ...

    def read(self, index: int) -> Tensor:
        """The image, uint8 (C, H, W), of any size. Raises UnreadableImage."""
        ...

    def read_many(self, indices: Indices) -> Tensor | None:
        """These images at once, uint8 (b, C, H, W), if they have one size and need no decoding; else None."""
        ...


class ArraySource:
    """Images held as one uint8 array (n, C, H, W): MNIST, Fashion-MNIST, CIFAR."""

    def __init__(self, title: str, images: NDArray[np.uint8], labels: Indices, channels: int) -> None:
        assert images.ndim == 4
        assert images.dtype == np.uint8
        assert len(images) == len(labels)
        self._title = title
        self._images = to_luma(images) if channels == 1 else images
        self.channels = channels
        self.labels = labels

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"{self._title} image {index}"

    def read(self, index: int) -> Tensor:
        return self.read_many(np.array([index]))[0]

    def read_many(self, indices: Indices) -> Tensor:
        images = self._images[indices]
        if images.shape[1] != self.channels:
            images = np.repeat(images, self.channels, axis=1)
        return torch.from_numpy(images)


class Selection:
    """Some images of another source, renumbered from 0."""

    def __init__(self, source: ImageSource, indices: Indices) -> None:
        self._source = source
        self._indices = indices
        self.labels = source.labels[indices]
        self.channels = source.channels

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def read(self, index: int) -> Tensor:
        return self._source.read(int(self._indices[index]))

    def read_many(self, indices: Indices) -> Tensor | None:
        return self._source.read_many(self._indices[indices])


def to_luma(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, 3, H, W) as grey (n, 1, H, W), by ITU-R 601-2 in the fixed point of Pillow's convert("L")."""
    if images.shape[1] == 1:
        return images
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)
    luma = np.einsum("nchw,c->nhw", images, weights, dtype=np.uint32, casting="unsafe")
    return ((luma + 0x8000) >> 16).astype(np.uint8)[:, None]
