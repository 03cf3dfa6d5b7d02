"""Classification losses and accuracy counts.

B  batch    C  classes
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.train import Loss


def classification_loss(logits: Tensor, targets: Tensor, kind: Loss, label_smoothing: float = 0.0) -> Tensor:
    """Mean loss of a batch, an fp32 scalar.

    softmax: cross-entropy against the class. sigmoid: binary cross-entropy of every class, summed over classes and
    averaged over the batch (google-research/big_vision `utils.py`, `sigmoid_xent`). bce: the same averaged over classes
    too, and every class that is a part of the target counts whole (facebookresearch/deit `--bce-loss`: `targets > 0`).
    Smoothing s replaces the target t by `t * (1 - s) + s / C` for softmax and sigmoid.

    Args:
        logits: (B, C), any float dtype; the loss is computed in fp32.
        targets: (B,), int64 class numbers; or (B, C), shares of each class that add up to 1.
    """
    logits = logits.float()
    if kind == "softmax":
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if kind in ("sigmoid", "bce"):
        losses = binary_losses(logits, targets, kind, label_smoothing)
        return losses.mean()
    raise ValueError(f"unknown loss {kind!r}: expected softmax, sigmoid or bce")


def binary_losses(
    logits: Tensor, targets: Tensor, kind: Literal["sigmoid", "bce"], label_smoothing: float = 0.0
) -> Tensor:
    """`classification_loss` of each sample, (B,), for the two kinds that look at each class by itself."""
    num_classes = logits.shape[1]
    shares = F.one_hot(targets, num_classes).float() if targets.ndim == 1 else targets.float()
    if kind == "bce":
        whole = (shares > 0.0).float()
        return F.binary_cross_entropy_with_logits(logits, whole, reduction="none").mean(dim=1)
    shares = shares * (1.0 - label_smoothing) + label_smoothing / num_classes
    return F.binary_cross_entropy_with_logits(logits, shares, reduction="none").sum(dim=1)


def count_topk_correct(logits: Tensor, labels: Tensor, mask: Tensor, k: int) -> Tensor:
    """How many unmasked samples have their class among the k largest logits: an int64 scalar on the logits' device.

    Of equal logits the lower class number ranks first, so that the count does not depend on the device. A sample whose
    own logit is NaN is wrong, and another class's NaN ranks above it: a broken model does not score.

    Args:
        logits: (B, C).
        labels: (B,), int64; those of masked rows are ignored.
        mask: (B,), bool: true where a row is a real sample.
    """
    own = labels.clamp(0, logits.shape[1] - 1).unsqueeze(1)  # padding may carry any label
    target = logits.gather(1, own)  # (B, 1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    above = ~(logits <= target) | ((logits == target) & (classes < own))  # (B, C)
    correct = (above.sum(dim=1) < k) & ~target.squeeze(1).isnan() & mask
    return correct.sum()
