"""Class probabilities of images, prepared the way the weights expect.

B  batch    C  classes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.wire import Preprocess
from vit.model import Network

if TYPE_CHECKING:
    from PIL.Image import Image

CENTER_MARGIN = 8 / 7
"""How much larger than the model's size an image is before its centre is cropped (256 for 224, big_vision)."""


def predict(model: Network, images: Sequence[Image | Tensor] | Tensor, batch_size: int = 64) -> Tensor:
    """Softmax probabilities, (B, C) fp32 on the CPU, of PIL images or uint8 tensors (channels, height, width) of any
    sizes. Uses the model's own preprocessing and runs it in eval mode; the mode it was in is restored.

    Raises:
        ValueError: the model has no preprocessing (it was not loaded by `vit.load`) or no classifier (`head:
            masked_patch`), or an image is neither.
    """
    if not model.config.has_classifier:
        raise ValueError("the model tells colours of masked patches and has no classifier: fine-tune it first")
    if model.preprocess is None:
        raise ValueError("the model does not say how images are prepared: load it with vit.load, or set .preprocess")
    prepared = [prepare(image, model.preprocess) for image in images]
    device = model.head.weight.device
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            batches = [
                model(torch.stack(prepared[start : start + batch_size]).to(device)).float().softmax(dim=1).cpu()
                for start in range(0, len(prepared), batch_size)
            ]
    finally:
        model.train(was_training)
    return torch.cat(batches) if batches else torch.empty(0, model.config.num_classes)


def prepare(image: Image | Tensor, preprocess: Preprocess) -> Tensor:
    """One normalised image, (channels, height, width) fp32: resized as uint8, then (x / 255 - mean) / std. These are
    the pixels that evaluation sees (tested against `workers.data`)."""
    pixels = _to_uint8(image, preprocess.in_channels)
    resized = _resize(pixels, preprocess)
    mean = torch.tensor(preprocess.mean).reshape(-1, 1, 1)
    std = torch.tensor(preprocess.std).reshape(-1, 1, 1)
    return (resized.float() / 255.0 - mean) / std


def _to_uint8(image: Image | Tensor, in_channels: int) -> Tensor:
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != in_channels:
            raise ValueError(
                f"image is {image.dtype} of shape {tuple(image.shape)}, expected uint8 ({in_channels}, height, width)"
            )
        return image
    if not hasattr(image, "convert"):
        raise ValueError(f"expected a PIL image or a uint8 tensor, got {type(image).__name__}")
    array = np.array(image.convert("L" if in_channels == 1 else "RGB"))  # (height, width[, 3])
    return torch.from_numpy(array).reshape(*array.shape[:2], in_channels).permute(2, 0, 1)


def _resize(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    height, width = preprocess.image_size
    if preprocess.crop == "resize":
        return _interpolate(pixels, (height, width), preprocess)
    scale = max(CENTER_MARGIN * height / pixels.shape[1], CENTER_MARGIN * width / pixels.shape[2])
    size = (max(round(pixels.shape[1] * scale), height), max(round(pixels.shape[2] * scale), width))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return _interpolate(pixels, size, preprocess)[:, top : top + height, left : left + width]


def _interpolate(pixels: Tensor, size: tuple[int, int], preprocess: Preprocess) -> Tensor:
    """uint8 to uint8, by the same kernel as the data pipeline."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    batch, mode = pixels[None], preprocess.interpolation
    return F.interpolate(batch, size=size, mode=mode, align_corners=False, antialias=preprocess.antialias)[0]
