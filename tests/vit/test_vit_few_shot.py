"""Few-shot least squares against the normal equations, and nearest neighbours against a vote by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vit.few_shot import choose_shots, few_shot_accuracy, fit_least_squares, knn_accuracy


def clusters(num: int, dim: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9)) * 3
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (num,), generator=generator)
    return centres[labels] + torch.randn(num, dim, generator=generator), labels


@pytest.mark.parametrize(("num", "dim"), [(200, 12), (8, 40)], ids=["more examples", "more features"])
def test_it_solves_the_regularised_normal_equations(num: int, dim: int) -> None:
    features, labels = clusters(num, dim, 4, 1)
    fitted = fit_least_squares(features, labels, 4, l2=2.0**10)
    x = features.double().numpy()
    x = (x - x.mean(0)) / (x.std(0) + 1e-5)
    x = np.concatenate([x, np.full((num, 1), 100.0)], axis=1)
    y = 2.0 * np.eye(4)[labels.numpy()] - 1.0
    expected = np.linalg.solve(x.T @ x + 2.0**10 * np.eye(dim + 1), x.T @ y)
    np.testing.assert_allclose(fitted.weights.numpy(), expected, rtol=1e-7, atol=1e-10)
    predicted = ((x @ expected).argmax(1) == fitted.predict(features.double()).numpy()).all()
    assert predicted


def test_more_shots_of_separable_classes_are_learned() -> None:
    pool, pool_labels = clusters(400, 16, 5, 2)
    test, test_labels = clusters(300, 16, 5, 3)
    scores = []
    for shots in (1, 10):
        chosen = choose_shots(pool_labels, 5, shots, seed=0)
        scores.append(few_shot_accuracy(pool[chosen], pool_labels[chosen], test, test_labels, 5))
    assert scores[1] >= scores[0]
    assert scores[1] > 0.95
    assert few_shot_accuracy(pool, pool_labels, test, test_labels.flip(0), 5) < 0.5, "labels matter"


def test_shots_are_balanced_nested_and_seeded() -> None:
    labels = torch.tensor([0] * 30 + [1] * 30 + [2] * 3)
    five, ten = choose_shots(labels, 3, 5, 7), choose_shots(labels, 3, 10, 7)
    assert torch.bincount(labels[five]).tolist() == [5, 5, 3]
    assert set(five.tolist()) <= set(ten.tolist())
    assert torch.equal(five, choose_shots(labels, 3, 5, 7))
    assert not torch.equal(five, choose_shots(labels, 3, 5, 8))


def test_neighbours_vote_by_similarity() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 1, 1])
    # One very near neighbour outweighs two that are far.
    assert knn_accuracy(bank, labels, torch.tensor([[5.0, 0.2]]), torch.tensor([0]), 2, k=3) == 1.0
    assert knn_accuracy(bank, labels, torch.tensor([[0.2, 5.0]]), torch.tensor([1]), 2, k=3) == 1.0
    pool, pool_labels = clusters(300, 8, 4, 4)
    test, test_labels = clusters(200, 8, 4, 5)
    whole = knn_accuracy(pool, pool_labels, test, test_labels, 4, k=10)
    assert whole > 0.95
    assert knn_accuracy(pool, pool_labels, test, test_labels, 4, k=10, chunk=7) == whole


def test_what_is_no_problem_is_refused() -> None:
    features, labels = clusters(6, 4, 3, 1)
    with pytest.raises(ValueError, match="there are 2 classes"):
        fit_least_squares(features, labels.clamp(min=2), 2)
    with pytest.raises(ValueError, match="0 features"):
        fit_least_squares(features[:0], labels[:0], 2)
    with pytest.raises(ValueError, match="k 7: expected 1 to 6"):
        knn_accuracy(features, labels, features, labels, 3, k=7)
