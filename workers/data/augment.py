"""Training augmentation and evaluation preprocessing, on uint8 images.

Legend: b images, C channels, H x W the image's size, h x w the model's.

Augmentation is a pure function of (seed, epoch, sample index). It follows google-research/vision_transformer
`vit_jax/input_pipeline.py`: `sample_distorted_bounding_box` with area (0.05, 1), then `tf.image.resize`, then a random
flip. So does resizing: bilinear, half-pixel centres, **no antialiasing**, in training and in evaluation alike (weights
trained by it expect it). Results are rounded to uint8, so that a batch is a quarter of the bytes; torch's native uint8
kernel does that within one grey level.

These functions run in loader threads. They copy with NumPy and resize with the uint8 kernel because torch's other
operations would start a team of OpenMP threads for each loader thread, which compete with the training step.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from configs.data import Augment, DataConfig
from workers.data.order import Indices
from workers.data.photometric import distort
from workers.data.random_bits import Stream, random_bits, uniforms

# Defaults of TensorFlow's op, which the official code leaves as they are.
ASPECT_RANGE = (0.75, 1.33)
MAX_ATTEMPTS = 100
SIMPLE_CROP_PADDING = 4

Floats = NDArray[np.float64]


def augment(image: Tensor, config: Augment, image_hw: tuple[int, int], seed: int, epoch: int, index: int) -> Tensor:
    """The training view of sample `index` in `epoch`: uint8 (C, H, W) to uint8 (C, h, w)."""
    return augment_batch(image[None], config, image_hw, seed, np.array([epoch]), np.array([index]))[0]


def augment_batch(
    images: Tensor, config: Augment, image_hw: tuple[int, int], seed: int, epochs: Indices, indices: Indices
) -> Tensor:
    """What `augment` returns for each image: uint8 (b, C, H, W) to uint8 (b, C, h, w), never the input's memory."""
    if config.crop == "inception":
        views = _crop_each(images, config.crop_area, image_hw, seed, epochs, indices)
    elif config.crop == "simple":
        views = _simple_crop_each(images, image_hw, seed, epochs, indices)
    else:
        views = resize(images, image_hw)
    if config.flip:
        flipped = (random_bits(Stream.FLIP, seed, epochs, indices) >> np.uint64(63)).astype(bool)
        pixels = views.numpy()
        pixels[flipped] = pixels[flipped][..., ::-1]
    if config.distorts:
        for i, (epoch, index) in enumerate(zip(epochs.tolist(), indices.tolist(), strict=True)):
            views[i] = distort(views[i], config, seed, epoch, index)
    return views


def eval_transform(images: Tensor, data: DataConfig, image_hw: tuple[int, int]) -> Tensor:
    """The evaluation view: uint8 (..., C, H, W) to uint8 (..., C, h, w).

    `resize` scales to the model's size, aspect ratio ignored (official fine-tuning evaluation). `center` scales so that
    the image covers 8/7 of the model's size (256 for 224, big_vision), then crops the centre.
    """
    if data.eval_crop == "resize":
        return resize(images, image_hw)
    resized = _resize_to_cover(images, image_hw, margin=8 / 7)
    height, width = resized.shape[-2:]
    top, left = (height - image_hw[0]) // 2, (width - image_hw[1]) // 2
    return _copy(resized[..., top : top + image_hw[0], left : left + image_hw[1]])


def resize(images: Tensor, image_hw: tuple[int, int]) -> Tensor:
    """Bilinear without antialiasing: uint8 (..., C, H, W) to a new uint8 (..., C, h, w)."""
    if tuple(images.shape[-2:]) == tuple(image_hw):
        return _copy(images)
    batch = images if images.ndim == 4 else images[None]
    resized = F.interpolate(batch, size=image_hw, mode="bilinear", align_corners=False, antialias=False)
    return resized if images.ndim == 4 else resized[0]


def _resize_to_cover(images: Tensor, image_hw: tuple[int, int], margin: float = 1.0) -> Tensor:
    """`resize` to the smallest size of the same aspect ratio that covers `margin` times `image_hw`."""
    height, width = images.shape[-2:]
    scale = max(margin * image_hw[0] / height, margin * image_hw[1] / width)
    return resize(images, (max(round(height * scale), image_hw[0]), max(round(width * scale), image_hw[1])))


def _copy(images: Tensor) -> Tensor:
    return torch.from_numpy(images.numpy().copy())


def crop_windows(
    heights: Indices, widths: Indices, area: tuple[float, float], seed: int, epochs: Indices, indices: Indices
) -> Indices:
    """Inception crops: int64 (b, 4) of top, left, height, width, one for each image of `heights` x `widths`.

    As TensorFlow's `sample_distorted_bounding_box` with one box covering the image: the aspect ratio is uniform in
    (0.75, 1.33), the height uniform between those that give the smallest and the largest area, the offset uniform
    (its upper bound exclusive, as there). After 100 attempts outside the limits: the whole image.
    """
    zeros = np.zeros_like(heights)
    windows = np.stack([zeros, zeros, heights, widths], axis=1)
    left_over = np.arange(len(heights))
    for attempt in range(MAX_ATTEMPTS):
        draws = uniforms(
            Stream.CROP, seed, epochs[left_over, None], indices[left_over, None], 4 * attempt + np.arange(4)[None]
        )
        proposed, fits = _propose(heights[left_over], widths[left_over], area, draws)
        windows[left_over[fits]] = proposed[fits]
        left_over = left_over[~fits]
        if not left_over.size:
            break
    return windows


def _propose(
    heights: Indices, widths: Indices, area: tuple[float, float], draws: Floats
) -> tuple[Indices, NDArray[np.bool_]]:
    """One attempt per image (TensorFlow's `GenerateRandomCrop`): windows (b, 4), and which of them are allowed."""
    aspect = ASPECT_RANGE[0] + draws[:, 0] * (ASPECT_RANGE[1] - ASPECT_RANGE[0])
    smallest, largest = area[0] * heights * widths, area[1] * heights * widths
    low = np.rint(np.sqrt(smallest / aspect))
    high = np.rint(np.sqrt(largest / aspect))
    too_wide = np.rint(high * aspect) > widths
    high = np.where(too_wide, np.floor((widths + 0.5 - 1e-7) / aspect), high)
    high = np.minimum(high, heights)
    low = np.minimum(low, high)
    height = low + np.floor(draws[:, 1] * (high - low + 1))
    width = np.rint(height * aspect)
    # Rounding may leave the area just outside the limits: one row more, or one fewer, often puts that right.
    for wrong, step in ((height * width < smallest, 1), (height * width > largest, -1)):
        height = height + step * wrong
        width = np.where(wrong, np.rint(height * aspect), width)
    fits = (height * width >= smallest) & (height * width <= largest)
    fits &= (height >= 1) & (width >= 1) & (height <= heights) & (width <= widths)
    top = np.floor(draws[:, 2] * (heights - height))
    left = np.floor(draws[:, 3] * (widths - width))
    return np.stack([top, left, height, width], axis=1).astype(np.int64), fits


def _crop_each(
    images: Tensor,
    area: tuple[float, float],
    image_hw: tuple[int, int],
    seed: int,
    epochs: Indices,
    indices: Indices,
) -> Tensor:
    num_images, channels, height, width = images.shape
    sizes = np.full(num_images, height), np.full(num_images, width)
    views = np.empty((num_images, channels, *image_hw), dtype=np.uint8)
    for i, (y, x, h, w) in enumerate(crop_windows(*sizes, area, seed, epochs, indices).tolist()):
        views[i] = resize(images[i, :, y : y + h, x : x + w], image_hw).numpy()
    return torch.from_numpy(views)


def _simple_crop_each(
    images: Tensor, image_hw: tuple[int, int], seed: int, epochs: Indices, indices: Indices
) -> Tensor:
    """DeiT-III's Simple Random Crop (facebookresearch/deit `augment.py`, `--src`): the shorter side becomes the
    model's, 4 reflected pixels are put round the image, and a window of the model's size is taken anywhere. Resizing
    is `resize` here too; DeiT-III's is bicubic with antialiasing."""
    resized = _resize_to_cover(images, image_hw).numpy()
    border = (SIMPLE_CROP_PADDING, SIMPLE_CROP_PADDING)
    padded = np.pad(resized, ((0, 0), (0, 0), border, border), mode="reflect")
    height, width = image_hw
    room = np.array([padded.shape[2] - height + 1, padded.shape[3] - width + 1])
    draws = uniforms(Stream.CROP, seed, epochs[:, None], indices[:, None], np.arange(2)[None])  # (b, 2)
    offsets = np.floor(draws * room).astype(np.int64)
    views = np.empty((*images.shape[:2], height, width), dtype=np.uint8)
    for i, (y, x) in enumerate(offsets.tolist()):
        views[i] = padded[i, :, y : y + height, x : x + width]
    return torch.from_numpy(views)
