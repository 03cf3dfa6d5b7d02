from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.data import Mix
from workers.data.mix import Mixing, apply_mixing, draw_mixing, symmetric_beta

HW = (32, 48)


@pytest.mark.parametrize("a", [0.05, 0.2, 0.8, 1.0, 2.0])
def test_shares_have_the_moments_of_beta(a: float) -> None:
    shares = np.array([symmetric_beta(a, 1, step) for step in range(4000)])
    assert ((shares >= 0) & (shares <= 1)).all()
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.08)


def test_a_draw_depends_on_seed_and_step_only() -> None:
    mix = Mix(mixup=0.8, cutmix=1.0)
    draws = [draw_mixing(mix, HW, 3, step) for step in range(200)]
    assert draws == [draw_mixing(mix, HW, 3, step) for step in range(200)]
    assert draws != [draw_mixing(mix, HW, 4, step) for step in range(200)]
    assert len({draw.share for draw in draws if draw is not None}) > 150


@pytest.mark.parametrize(
    ("mix", "mixed", "cut"),
    [
        (Mix(mixup=0.5), 1.0, 0.0),
        (Mix(cutmix=1.0), 1.0, 1.0),
        (Mix(mixup=0.8, cutmix=1.0), 1.0, 0.5),
        (Mix(mixup=0.8, cutmix=1.0, cutmix_share=0.25, probability=0.8), 0.8, 0.2),
    ],
)
def test_how_often(mix: Mix, mixed: float, cut: float) -> None:
    draws = [draw for step in range(3000) if (draw := draw_mixing(mix, HW, 0, step)) is not None]
    assert len(draws) / 3000 == pytest.approx(mixed, abs=0.03)
    assert sum(draw.box is not None for draw in draws) / 3000 == pytest.approx(cut, abs=0.03)


def test_the_share_is_the_area_that_is_left() -> None:
    areas = []
    for step in range(500):
        draw = draw_mixing(Mix(cutmix=1.0), HW, 0, step)
        assert draw is not None
        assert draw.box is not None
        top, left, bottom, right = draw.box
        assert 0 <= top <= bottom <= HW[0]
        assert 0 <= left <= right <= HW[1]
        areas.append((bottom - top) * (right - left) / (HW[0] * HW[1]))
        assert draw.share == pytest.approx(1 - areas[-1])
    assert max(areas) > 0.8
    assert min(areas) < 0.05


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 2, 3).clone(), torch.tensor([0, 2, 1, 1])


def test_mixup_by_hand() -> None:
    images, targets = apply_mixing(Mixing(0.75), *batch(), num_classes=3)
    assert images[:, 0, 0, 0].tolist() == [0.25, 0.75, 2.25, 2.75]
    assert targets.tolist() == [[0.75, 0, 0.25], [0.25, 0, 0.75], [0, 1, 0], [0, 1, 0]]


def test_cutmix_by_hand() -> None:
    images, labels = batch()
    mixed, targets = apply_mixing(Mixing(5 / 6, (1, 2, 2, 3)), images, labels, num_classes=3)
    assert mixed[0, 0].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert mixed[3, 0].tolist() == [[3, 3, 3], [3, 3, 2]]
    torch.testing.assert_close(targets[0], torch.tensor([5 / 6, 0, 1 / 6]))
    assert torch.equal(images, batch()[0])


def test_micro_batches_are_parts_of_the_global_batch() -> None:
    images, labels = torch.randn(8, 3, 4, 4), torch.randint(0, 5, (8,))
    for mixing in (Mixing(0.3), Mixing(0.75, (0, 0, 2, 2))):
        whole = apply_mixing(mixing, images, labels, 5)
        parts = [apply_mixing(mixing, i, t, 5) for i, t in zip(images.split(2), labels.split(2), strict=True)]
        for number in (0, 1):
            assert torch.equal(whole[number], torch.cat([part[number] for part in parts]))
