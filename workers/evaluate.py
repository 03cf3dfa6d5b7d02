"""Accuracy of a model on a split, the same number for any number of workers.

Every rank sees equally many batches; places that hold no image are masked. What is summed over batches and ranks are
int64 counts, and losses in fixed point (2^-24), so the order of summation cannot change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from configs.data import DataConfig
from configs.train import Loss
from vit.losses import binary_losses, count_topk_correct
from workers.data.loader import Batch, normalise
from workers.distributed import Ranks

_LOSS_UNIT = 2.0**-24
_LOSS_LIMIT = 1e4
"""A sample's loss counts up to here, so that the sum of 10^7 samples fits."""


def evaluate(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    data: DataConfig,
    loss: Loss,
    ranks: Ranks,
    keep_going: Callable[[], bool] = lambda: True,
) -> dict[str, float] | None:
    """eval/top1, eval/top5 (fractions), eval/loss (mean, natural logarithm, without label smoothing) and
    eval/num_examples, over all ranks (collective). With fewer than five classes, top5 means all of them, and is 1.

    `keep_going` is asked after every batch and must answer alike on all ranks; when it says no, the result is None.
    A non-finite loss of any sample makes eval/loss NaN.
    """
    totals = torch.zeros(5, dtype=torch.int64, device=ranks.device)
    for batch in batches:
        images = normalise(batch.images.to(ranks.device, non_blocking=True), data.mean, data.std)
        labels = batch.labels.to(ranks.device, non_blocking=True)
        mask = batch.mask.to(ranks.device, non_blocking=True)
        logits = forward(images).float()
        losses = _loss_per_sample(logits, labels, loss).double()  # (B,)
        finite = losses.isfinite()
        units = (losses.clamp(max=_LOSS_LIMIT) / _LOSS_UNIT).round()
        totals += torch.stack(
            [
                mask.sum(),
                count_topk_correct(logits, labels, mask, 1),
                count_topk_correct(logits, labels, mask, 5),
                torch.where(mask & finite, units, 0.0).sum().to(torch.int64),
                (mask & ~finite).sum(),
            ]
        )
        if not keep_going():
            return None
    counts = totals.cpu()
    dist.all_reduce(counts, group=ranks.control_group)
    num_examples, top1, top5, loss_units, num_nonfinite = counts.tolist()
    return {
        "eval/top1": top1 / max(num_examples, 1),
        "eval/top5": top5 / max(num_examples, 1),
        "eval/loss": float("nan") if num_nonfinite else loss_units * _LOSS_UNIT / max(num_examples, 1),
        "eval/num_examples": float(num_examples),
    }


def _loss_per_sample(logits: Tensor, labels: Tensor, kind: Loss) -> Tensor:
    """(B,), as vit.losses.classification_loss before its mean."""
    if kind == "softmax":
        return F.cross_entropy(logits, labels, reduction="none")
    return binary_losses(logits, labels, kind)
