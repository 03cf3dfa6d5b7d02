"""Mixup and cutmix: batch augmentation as a pure function of (seed, step), applied on the device.

Samples 2i and 2i + 1 of the *global* batch are mixed with one another, so the result does not depend on the number of
workers or the micro-batch size, which only has to be even. As in google-research/big_vision (mixup) and timm's batch
mode (cutmix), the share and the box are drawn once for the whole batch:

    mixup    x' = share * x + (1 - share) * partner                     share ~ Beta(a, a)
    cutmix   a box of (1 - share) of the area is the partner's; cut off at the border, and the share put right by it
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from configs.data import Mix
from workers.data.random_bits import Stream, uniforms

_COIN, _KIND, _BOX, _SHARE = 0, 1, 2, 16
"""Which draw of a step is used for what; shares may take any number from _SHARE on."""


@dataclass(frozen=True)
class Mixing:
    """What happens to the batch of one step."""

    share: float
    """Of a sample itself; the rest is its partner's."""
    box: tuple[int, int, int, int] | None = None
    """top, left, bottom, right of what cutmix takes from the partner; None: mixup."""


def draw_mixing(mix: Mix, image_hw: tuple[int, int], seed: int, step: int) -> Mixing | None:
    """How the global batch of `step` is mixed; None: not at all."""
    coin, kind, centre_y, centre_x = uniforms(Stream.MIX, seed, step, [_COIN, _KIND, _BOX, _BOX + 1]).tolist()
    if coin >= mix.probability:
        return None
    is_cut = mix.cutmix > 0.0 and (mix.mixup == 0.0 or kind < mix.cutmix_share)
    share = symmetric_beta(mix.cutmix if is_cut else mix.mixup, seed, step)
    if not is_cut:
        return Mixing(share)
    (height, width), side = image_hw, math.sqrt(1.0 - share)
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = int(centre_y * height), int(centre_x * width)
    top, bottom = max(y - half_h, 0), min(y + half_h, height)
    left, right = max(x - half_w, 0), min(x + half_w, width)
    return Mixing(1.0 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))


def symmetric_beta(a: float, seed: int, step: int) -> float:
    """Beta(a, a), by Jöhnk's method: u^(1/a) / (u^(1/a) + v^(1/a)) for the first pair whose sum is at most 1. In
    logarithms, since for a small a both powers may be too small for a number."""
    attempt = 0
    while True:
        u, v = uniforms(Stream.MIX, seed, step, [_SHARE + 2 * attempt, _SHARE + 2 * attempt + 1]).tolist()
        attempt += 1
        if u == 0.0 or v == 0.0:
            continue
        log_x, log_y = math.log(u) / a, math.log(v) / a
        top = max(log_x, log_y)
        log_sum = top + math.log(math.exp(log_x - top) + math.exp(log_y - top))
        if log_sum <= 0.0:
            return math.exp(log_x - log_sum)


def apply_mixing(mixing: Mixing, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Images (b, C, h, w) and shares of each class, fp32 (b, num_classes), of a micro-batch.

    Args:
        images: normalised, (b, C, h, w), b even and the first at an even place of the global batch.
        labels: int64 (b,).
    """
    assert len(images) % 2 == 0, "the spec asks for even micro-batches"
    one_hot = F.one_hot(labels, num_classes).float()
    targets = mixing.share * one_hot + (1.0 - mixing.share) * _partners(one_hot)
    if mixing.box is None:
        return mixing.share * images + (1.0 - mixing.share) * _partners(images), targets
    top, left, bottom, right = mixing.box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = _partners(images)[..., top:bottom, left:right]
    return mixed, targets


def _partners(batch: Tensor) -> Tensor:
    """Each pair of rows the other way round."""
    return batch.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


__all__ = ["Mixing", "apply_mixing", "draw_mixing", "symmetric_beta"]
