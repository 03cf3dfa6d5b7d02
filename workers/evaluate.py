"""Accuracy of a model on a split, the same number for any number of workers.

Every rank sees equally many batches; places that hold no image are masked. What is summed over batches and ranks are
int64 counts, and losses in fixed point (2^-24), so the order of summation cannot change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from configs.data import DataConfig
from configs.train import Loss
from vit.losses import binary_losses, count_topk_correct
from vit.masked import Corruption, at_chosen, draw_corruption, mean_colours
from workers.data.loader import Batch, normalise
from workers.distributed import Ranks
from workers.randomness import mix
from workers.real_labels import NO_LABEL

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
    real_labels: Tensor | None = None,
) -> dict[str, float] | None:
    """eval/top1, eval/top5 (fractions), eval/loss (mean, natural logarithm, without label smoothing) and
    eval/num_examples, over all ranks (collective). With fewer than five classes, top5 means all of them, and is 1.

    `keep_going` is asked after every batch and must answer alike on all ranks; when it says no, the result is None.
    A non-finite loss of any sample makes eval/loss NaN.

    With `real_labels` (workers/real_labels.py) also eval/real_top1, the share of images whose first class is one of
    theirs among the eval/real_num_examples images that have labels.
    """
    real = torch.zeros(2, dtype=torch.int64, device=ranks.device)

    def score() -> Iterator[_Scored]:
        nonlocal real
        for batch in batches:
            images = normalise(batch.images.to(ranks.device, non_blocking=True), data.mean, data.std)
            labels = batch.labels.to(ranks.device, non_blocking=True)
            mask = batch.mask.to(ranks.device, non_blocking=True)
            logits = forward(images).float()
            if real_labels is not None:
                right = real_labels[batch.sample_ids.clamp(min=0)].to(ranks.device, non_blocking=True)
                real += _count_real(logits, right, mask)
            yield _Scored(logits, labels, mask, _loss_per_sample(logits, labels, loss))

    measured = _measure(score(), ranks, keep_going)
    if measured is None or real_labels is None:
        return measured
    counts = real.cpu()
    dist.all_reduce(counts, group=ranks.control_group)
    num_labelled, num_right = counts.tolist()
    return measured | {
        "eval/real_top1": num_right / max(num_labelled, 1),
        "eval/real_num_examples": float(num_labelled),
    }


def _count_real(logits: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """How many images count and have labels, and how many of these have one of them as the class of the largest logit:
    int64 (2,). Of equal logits the lower class number is the first; who says NaN is wrong."""
    first = logits.argmax(dim=1, keepdim=True)  # (b, 1)
    is_labelled = mask & (right != NO_LABEL).any(dim=1)
    is_right = is_labelled & (right == first).any(dim=1) & ~logits.isnan().any(dim=1)
    return torch.stack([is_labelled.sum(), is_right.sum()])


def evaluate_masked(
    forward: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[Batch],
    data: DataConfig,
    stride: int,
    ranks: Ranks,
    keep_going: Callable[[], bool] = lambda: True,
) -> dict[str, float] | None:
    """As `evaluate`, of masked patch prediction: eval/top1, eval/top5 and eval/loss are means over the corrupted
    patches of all images. An image is corrupted in the same way in every evaluation, whoever does it: by its number in
    the split. `forward` maps normalised images and sources (`Corruption`) to logits of each patch."""
    chosen_per_image = 1

    def score() -> Iterator[_Scored]:
        nonlocal chosen_per_image
        for batch in batches:
            pixels = batch.images.to(ranks.device, non_blocking=True)
            colours = mean_colours(pixels, stride)
            corruption = corruption_of(batch.sample_ids, colours.shape[1]).to(ranks.device)
            logits = forward(normalise(pixels, data.mean, data.std), corruption.sources)
            predicted = at_chosen(logits, corruption.chosen).float().flatten(0, 1)
            truth = at_chosen(colours, corruption.chosen).flatten()
            chosen_per_image = corruption.chosen.shape[1]
            mask = batch.mask.to(ranks.device, non_blocking=True).repeat_interleave(chosen_per_image)
            yield _Scored(predicted, truth, mask, F.cross_entropy(predicted, truth, reduction="none"))

    measured = _measure(score(), ranks, keep_going)
    if measured is None:
        return None
    return measured | {"eval/num_examples": measured["eval/num_examples"] / chosen_per_image}


def corruption_of(sample_ids: Tensor, num_patches: int) -> Corruption:
    """The corruption of each of these samples, on the CPU."""
    drawn = [
        draw_corruption(1, num_patches, generator=torch.Generator().manual_seed(mix(sample_id + 1)))  # padding is -1
        for sample_id in sample_ids.tolist()
    ]
    return Corruption(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


@dataclass(frozen=True)
class _Scored:
    """What a model made of some samples, b of them."""

    logits: Tensor  # fp32 (b, C)
    labels: Tensor  # int64 (b,)
    mask: Tensor  # bool (b,): which count
    losses: Tensor  # fp32 (b,)


def _measure(scored: Iterable[_Scored], ranks: Ranks, keep_going: Callable[[], bool]) -> dict[str, float] | None:
    totals = torch.zeros(5, dtype=torch.int64, device=ranks.device)
    for part in scored:
        mask, losses = part.mask, part.losses.double()
        finite = losses.isfinite()
        units = (losses.clamp(max=_LOSS_LIMIT) / _LOSS_UNIT).round()
        totals += torch.stack(
            [
                mask.sum(),
                count_topk_correct(part.logits, part.labels, mask, 1),
                count_topk_correct(part.logits, part.labels, mask, 5),
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
