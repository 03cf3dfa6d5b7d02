"""Images in files, decoded by Pillow. Nothing about a file is trusted: formats are listed, sizes are bounded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from workers.data.errors import UnreadableImage
from workers.data.order import Indices

MAX_PIXELS = 64 * 1024 * 1024
"""Above this an image is refused before it is decoded: a small file can unfold into gigabytes."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("error", Image.DecompressionBombWarning)


class FileSource:
    """Images in files below `root`, with labels; `sizes`, where known, are checked against what is read."""

    def __init__(
        self, root: Path, paths: Sequence[str], labels: Indices, channels: int, sizes: Sequence[int] | None = None
    ) -> None:
        assert len(paths) == len(labels)
        self.root = root
        self.labels = labels
        self.channels = channels
        self._paths = paths
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> Tensor:
        try:
            content = (self.root / self._paths[index]).read_bytes()
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error
        if self._sizes is not None and len(content) != self._sizes[index]:
            raise UnreadableImage(f"{len(content)} bytes, the data set's index says {self._sizes[index]}")
        return decode(content, self.channels)

    def read_many(self, indices: Indices) -> None:  # noqa: ARG002 - they need decoding
        return None


def decode(content: bytes, channels: int) -> Tensor:
    """The image as uint8 (C, H, W), converted to grey (1 channel) or RGB (3).

    Raises:
        UnreadableImage: not an image of FORMATS, damaged, or more than MAX_PIXELS.
    """
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError) as error:
        # Pillow's readers raise any of these for damaged files.
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(str(error)) from error
    return torch.from_numpy(pixels if channels == 3 else pixels[..., None]).permute(2, 0, 1)
