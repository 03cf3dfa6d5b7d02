from __future__ import annotations

import math

import pytest
import torch

from vit.losses import classification_loss, count_topk_correct

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 2])


def smoothed(label: int, smoothing: float) -> list[float]:
    return [(1 - smoothing) * (label == c) + smoothing / 3 for c in range(3)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_by_hand(smoothing: float) -> None:
    total = 0.0
    for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        log_z = math.log(sum(math.exp(x) for x in row))
        total -= sum(t * (x - log_z) for t, x in zip(smoothed(label, smoothing), row, strict=True))
    loss = classification_loss(LOGITS, LABELS, "softmax", smoothing)
    assert loss.item() == pytest.approx(total / 2, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_is_summed_over_classes_and_averaged_over_the_batch(smoothing: float) -> None:
    total = 0.0
    for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        for target, x in zip(smoothed(label, smoothing), row, strict=True):
            p = 1 / (1 + math.exp(-x))
            total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    loss = classification_loss(LOGITS, LABELS, "sigmoid", smoothing)
    assert loss.item() == pytest.approx(total / 2, rel=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_loss_is_computed_in_fp32(kind) -> None:
    loss = classification_loss(LOGITS.bfloat16(), LABELS, kind)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(classification_loss(LOGITS, LABELS, kind).item(), rel=1e-6)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    for kind in ("softmax", "sigmoid"):
        assert classification_loss(logits, torch.tensor([1]), kind).isfinite()


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        classification_loss(LOGITS, LABELS, "hinge")  # type: ignore[arg-type]


def test_topk_counts_equal_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 11, generator=generator)
    labels = torch.randint(0, 11, (200,), generator=generator)
    mask = torch.rand(200, generator=generator) < 0.7
    for k in (1, 5, 11):
        top = logits.argsort(dim=1, descending=True)[:, :k]
        expected = sum(
            int(label in row) for label, row, m in zip(labels.tolist(), top.tolist(), mask.tolist(), strict=True) if m
        )
        count = count_topk_correct(logits, labels, mask, k)
        assert (count.dtype, count.shape) == (torch.int64, ())
        assert count.item() == expected


def test_masked_rows_and_their_labels_do_not_count() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, -1])
    assert count_topk_correct(logits, labels, torch.tensor([True, False, False]), 1).item() == 1


def test_ties_go_to_the_lower_class() -> None:
    zeros, mask = torch.zeros(4, 4), torch.ones(4, dtype=torch.bool)
    assert count_topk_correct(zeros, torch.arange(4), mask, 1).item() == 1
    assert count_topk_correct(zeros, torch.arange(4), mask, 3).item() == 3


def test_nan_does_not_score() -> None:
    nan, mask = float("nan"), torch.ones(1, dtype=torch.bool)
    for row in ([nan, nan, nan], [nan, 1.0, 0.0], [1.0, nan, 0.0]):
        assert count_topk_correct(torch.tensor([row]), torch.tensor([0]), mask, 1).item() == 0
    assert count_topk_correct(torch.full((1, 3), nan), torch.tensor([0]), mask, 5).item() == 0


SHARES = torch.tensor([[0.7, 0.0, 0.3], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_one_hot_shares_are_labels(kind, smoothing: float) -> None:
    one_hot = torch.nn.functional.one_hot(LABELS, 3).float()
    expected = classification_loss(LOGITS, LABELS, kind, smoothing)
    torch.testing.assert_close(classification_loss(LOGITS, one_hot, kind, smoothing), expected)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_mixed_targets_are_mixed_losses(kind) -> None:
    """Both losses are linear in the target, smoothing included."""
    first = classification_loss(LOGITS, torch.tensor([0, 1]), kind, 0.1)
    second = classification_loss(LOGITS, torch.tensor([2, 0]), kind, 0.1)
    mixed = torch.tensor([[0.75, 0.0, 0.25], [0.25, 0.75, 0.0]])
    torch.testing.assert_close(classification_loss(LOGITS, mixed, kind, 0.1), 0.75 * first + 0.25 * second)


def test_bce_is_deits() -> None:
    """engine.py of facebookresearch/deit: BCEWithLogitsLoss on `targets.gt(0.0)`, the mean over samples and classes."""
    expected = torch.nn.BCEWithLogitsLoss()(LOGITS, SHARES.gt(0.0).float())
    torch.testing.assert_close(classification_loss(LOGITS, SHARES, "bce"), expected)
    labelled = classification_loss(LOGITS, LABELS, "bce")
    torch.testing.assert_close(labelled, classification_loss(LOGITS, LABELS, "sigmoid") / 3)
