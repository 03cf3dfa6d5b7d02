"""Generated images: a class is a colour and a texture, so that a small model can learn them; made on the fly."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.data import SyntheticSource
from workers.data.order import Indices
from workers.data.random_bits import Bits, Stream, random_bits

_NOISE_BYTES = 1 << 16
_SPLITS = {"train": 0, "test": 1}


class SyntheticImages:
    """Image i of class i mod num_classes: stripes of the class's direction and width in the class's colour, with a
    phase and a noise of its own. A pure function of (split, i)."""

    def __init__(self, source: SyntheticSource, split: str, channels: int) -> None:
        self.channels = channels
        num_images = source.num_train if split == "train" else source.num_eval
        self.labels = np.arange(num_images, dtype=np.int64) % source.num_classes
        self._split = _SPLITS[split]
        self._side = np.arange(source.image_size).astype(np.uint8)
        num_pixels = source.image_size**2
        noise = random_bits(Stream.SYNTHETIC, 0, np.arange(_NOISE_BYTES // 8)).view(np.uint8)
        # Repeated, so that the window of an image may start anywhere in the first copy.
        self._noise = np.resize(noise & 31, num_pixels + _NOISE_BYTES)
        self._wave = 40 * np.sin(np.arange(256) * (2 * np.pi / 256))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"synthetic image {index}"

    def read(self, index: int) -> Tensor:
        return self.read_many(np.array([index]))[0]

    def read_many(self, indices: Indices) -> Tensor:
        size = len(self._side)
        of_class = _bytes(random_bits(Stream.SYNTHETIC, 1, self.labels[indices]))
        of_image = _bytes(random_bits(Stream.SYNTHETIC, 2, self._split, indices))
        colours = 48 + 0.625 * of_class[:, 2 : 2 + self.channels].astype(np.float64)
        tables = np.clip(colours[:, :, None] + self._wave, 0, 255).astype(np.uint8)
        pixels = np.empty((len(indices), self.channels, size, size), dtype=np.uint8)
        for image, table, class_bytes, image_bytes in zip(pixels, tables, of_class, of_image, strict=True):
            # bytes.translate looks up a table several times faster than array indexing does.
            phases = self._phases(class_bytes, image_bytes).tobytes()
            for plane, shades in zip(image, table, strict=True):
                plane[:] = np.frombuffer(phases.translate(shades.tobytes()), dtype=np.uint8).reshape(size, size)
        return torch.from_numpy(pixels)

    def _phases(self, of_class: NDArray[np.uint8], of_image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Where each pixel is on the wave, modulo 256: uint8 (S, S)."""
        size = len(self._side)
        down, across = of_class[:2] % 48 - 24
        start = int(of_image[1]) + 256 * int(of_image[2])
        noise = self._noise[start : start + size * size].reshape(size, size)
        return (self._side * down + of_image[0])[:, None] + (self._side * across)[None] + noise


def _bytes(bits: Bits) -> NDArray[np.uint8]:
    """The eight bytes of each word, least significant first: uint8 (b, 8)."""
    shifts = np.arange(0, 64, 8, dtype=np.uint64)
    return ((bits[:, None] >> shifts) & np.uint64(255)).astype(np.uint8)
