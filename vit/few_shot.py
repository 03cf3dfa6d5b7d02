"""Accuracy of frozen features: few-shot least squares, and nearest neighbours.

    N  training examples     D  feature dimension     C  classes     M  test examples

The least squares are google-research/big_vision `evaluators/fewshot_lsr.py` (paper, 4.1): features whitened by the mean
and standard deviation of the few training examples, a constant feature of 100 for a bias that the penalty hardly
touches, targets +-1, and the closed form of ridge regression.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BIAS_CONSTANT = 100.0
WHITEN_EPS = 1e-5
L2 = 2.0**10


@dataclass(frozen=True)
class LeastSquares:
    """A regularised linear classifier on whitened features."""

    mean: Tensor  # (1, D)
    std: Tensor  # (1, D)
    weights: Tensor  # (D + 1, C)

    def predict(self, features: Tensor) -> Tensor:
        """The class of each of (M, D) features, int64 (M,)."""
        return (_with_bias((features - self.mean) / self.std) @ self.weights).argmax(dim=1)


def fit_least_squares(features: Tensor, labels: Tensor, num_classes: int, l2: float = L2) -> LeastSquares:
    """Fit (N, D) features of `labels` (N,) by (x^T x + l2)^-1 x^T y, through the eigenvalues of x^T x or of x x^T,
    whichever is smaller. In fp64: on few examples x^T x is singular but for the penalty.

    Raises:
        ValueError: there are no examples, or a label is none of the classes.
    """
    if len(features) == 0 or len(features) != len(labels):
        raise ValueError(f"{len(features)} features for {len(labels)} labels make no few-shot problem")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels lie in [{int(labels.min())}, {int(labels.max())}], there are {num_classes} classes")
    features = features.double()
    mean = features.mean(dim=0, keepdim=True)
    std = features.std(dim=0, keepdim=True, correction=0) + WHITEN_EPS
    x = _with_bias((features - mean) / std)  # (N, D + 1)
    y = 2.0 * F.one_hot(labels, num_classes).double() - 1.0  # (N, C)
    if x.shape[0] >= x.shape[1]:
        values, vectors = torch.linalg.eigh(x.T @ x)
        weights = (vectors / (values + l2)) @ (vectors.T @ (x.T @ y))
    else:
        values, vectors = torch.linalg.eigh(x @ x.T)
        weights = ((x.T @ vectors) / (values + l2)) @ (vectors.T @ y)
    return LeastSquares(mean, std, weights)


def few_shot_accuracy(
    features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor, num_classes: int, l2: float = L2
) -> float:
    """Share of the test examples that a classifier fitted to the others gets right."""
    fitted = fit_least_squares(features, labels, num_classes, l2)
    return float((fitted.predict(test_features.double()) == test_labels).double().mean())


def choose_shots(labels: Tensor, num_classes: int, shots: int, seed: int) -> Tensor:
    """Indices of `shots` examples of each class, class by class: the first of a permutation that `seed` makes, so that
    5 shots begin with the 1 shot of the same seed. A class with fewer gives all it has."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    return torch.cat([order[shuffled == number][:shots] for number in range(num_classes)])


def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> float:
    """Accuracy of the weighted vote of the `k` nearest training examples by cosine similarity, each with weight
    exp(similarity / temperature) (Wu et al. 2018, section 3.4; facebookresearch/dino `eval_knn.py`)."""
    if not 1 <= k <= len(features):
        raise ValueError(f"k {k}: expected 1 to {len(features)}, the number of training examples")
    bank = F.normalize(features.float(), dim=1).T  # (D, N)
    correct = 0
    for part, truth in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        similarity, nearest = (F.normalize(part.float(), dim=1) @ bank).topk(k, dim=1)  # (m, k)
        votes = torch.zeros(len(part), num_classes)
        votes.scatter_add_(1, labels[nearest], torch.exp(similarity / temperature))
        correct += int((votes.argmax(dim=1) == truth).sum())
    return correct / len(test_labels)


def _with_bias(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=BIAS_CONSTANT)
