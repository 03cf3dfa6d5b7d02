"""Masked patch prediction (paper, 4.6 and B.1.2): half of the patch embeddings are corrupted, and the mean colour of
each corrupted patch, to 3 bits per channel, is to be told from what the Transformer makes of it.

    B  batch      n  patches      M  corrupted patches of an image      C  colours, 8 per channel
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED, OTHER = 0.8, 0.1
"""Shares of the corrupted patches whose embedding becomes the learned [mask], or that of another patch of the same
image; the others keep theirs."""
_LEVELS = 8
_LEVEL_WIDTH = 256 // _LEVELS


class Corruption(NamedTuple):
    """Which patches of a batch are corrupted, and how."""

    sources: Tensor
    """int64 (B, n): the patch whose embedding stands at each place; n for the [mask]."""
    chosen: Tensor
    """int64 (B, M): the corrupted places, those that were kept as they are included."""

    def to(self, device: torch.device) -> Corruption:
        return Corruption(self.sources.to(device), self.chosen.to(device))


def draw_corruption(
    num_images: int, num_patches: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Corruption:
    """A random corruption of half of the patches (rounded down) of each image: of equally many in all of them, so that
    the mean over micro-batches is the mean over patches.

    Raises:
        ValueError: there is only one patch, which has no other.
    """
    if num_patches < 2:
        raise ValueError(f"masked patch prediction needs at least 2 patches, got {num_patches}")

    def draw(count: int) -> Tensor:
        return torch.rand(num_images, count, device=device, generator=generator)

    chosen = draw(num_patches).argsort(dim=1)[:, : num_patches // 2]  # (B, M)
    # The other of a patch is the next one on a random circle: any other patch, but no patch is that of two places. Its
    # gradient is then a sum of two at most, which has no order: it is the same in every run, on a GPU too.
    circle = draw(num_patches).argsort(dim=1)
    other = torch.empty_like(circle).scatter_(1, circle, circle.roll(-1, dims=1))  # (B, n)
    fate = draw(chosen.shape[1])
    kept_or_other = torch.where(fate < MASKED + OTHER, other.gather(1, chosen), chosen)
    replaced = torch.where(fate < MASKED, num_patches, kept_or_other)
    places = torch.arange(num_patches, device=device).expand(num_images, -1)
    return Corruption(places.scatter(1, chosen, replaced), chosen)


def mean_colours(pixels: Tensor, stride: int) -> Tensor:
    """The mean colour of each patch of `stride` x `stride` pixels to 3 bits per channel, as a number, the first channel
    its highest digit: uint8 (B, channels, height, width) -> int64 (B, n). In whole numbers: the same on every
    device."""
    batch, channels, height, width = pixels.shape
    cut = pixels.reshape(batch, channels, height // stride, stride, width // stride, stride)
    levels = cut.sum(dim=(3, 5), dtype=torch.int64) // (_LEVEL_WIDTH * stride * stride)  # (B, channels, rows, columns)
    colours = levels[:, 0]
    for channel in range(1, channels):
        colours = colours * _LEVELS + levels[:, channel]
    return colours.flatten(1)


def at_chosen(values: Tensor, chosen: Tensor) -> Tensor:
    """What `values`, (B, n) or (B, n, C), hold at the corrupted places: (B, M) or (B, M, C)."""
    if values.ndim == 2:
        return values.gather(1, chosen)
    return values.gather(1, chosen.unsqueeze(2).expand(-1, -1, values.shape[2]))


def masked_patch_loss(logits: Tensor, colours: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the corrupted patches, and the share of them whose colour has the largest logit, both
    fp32 scalars; of logits (B, n, C) and colours (B, n)."""
    predicted, truth = at_chosen(logits, chosen).float().flatten(0, 1), at_chosen(colours, chosen).flatten()
    right = (predicted.detach().argmax(dim=1) == truth).float().mean()
    return F.cross_entropy(predicted, truth), right
