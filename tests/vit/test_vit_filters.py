"""First filters: principal components against an eigendecomposition, and stems as they are convolved with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from configs.model import BitConfig, ResNetConfig, StemConfig
from vit import build
from vit.filters import patch_filters, principal_components, stem_filters


def test_components_are_the_directions_in_which_filters_differ() -> None:
    """Two patterns, of which filters hold random amounts, the first twice as much; and a mean they all share."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.linalg.qr(torch.randn(12, 2, generator=generator))[0].T  # orthonormal
    amounts = torch.randn(50, 2, generator=generator)
    amounts = torch.linalg.qr(amounts - amounts.mean(dim=0))[0] * torch.tensor([2.0, 1.0])
    filters = (5.0 + amounts @ patterns).unflatten(1, (3, 2, 2))
    found = principal_components(filters, 2)
    assert found.filters.shape == (2, 3, 2, 2)
    assert found.explained.tolist() == pytest.approx([0.8, 0.2], abs=1e-5)
    for component, pattern in zip(found.filters.flatten(1), patterns, strict=True):
        assert abs(float(component @ pattern)) == pytest.approx(1.0, abs=1e-5)


def test_components_are_those_of_the_covariance() -> None:
    filters = torch.randn(40, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    found = principal_components(filters)
    values, vectors = np.linalg.eigh(np.cov(filters.flatten(1).double().numpy(), rowvar=False))
    assert found.filters.shape == (12, 3, 2, 2)  # no more than a filter has values
    assert found.explained.numpy() == pytest.approx(values[::-1] / values.sum(), rel=1e-4)
    products = np.abs((found.filters.flatten(1).numpy() * vectors.T[::-1]).sum(axis=1))
    assert products == pytest.approx(np.ones(12), abs=1e-4)


def test_a_components_largest_value_is_positive_and_its_length_1() -> None:
    found = principal_components(torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(2)))
    flat = found.filters.flatten(1)
    assert len(flat) == 28
    assert (flat.amax(dim=1) == flat.abs().amax(dim=1)).all()
    assert flat.norm(dim=1).tolist() == pytest.approx([1.0] * 28, abs=1e-5)
    assert (found.explained.diff() <= 0).all()


def test_few_filters_have_few_components() -> None:
    assert len(principal_components(torch.randn(5, 1, 7, 7)).filters) == 4
    assert torch.isfinite(principal_components(torch.ones(5, 1, 2, 2)).explained).all()


def test_patch_filters_are_of_the_image(make_model: Any) -> None:
    model = make_model()
    assert torch.equal(patch_filters(model), model.patch_embed.proj.weight)
    hybrid = make_model(stem=StemConfig(layers=(), width=32), patch_size=1)
    with pytest.raises(ValueError, match="features of its stem"):
        patch_filters(hybrid)


def test_stem_filters_are_standardised_as_they_are_applied(make_model: Any) -> None:
    hybrid = make_model(stem=StemConfig(layers=(), width=32), patch_size=1)
    bit = build(BitConfig(resnet=ResNetConfig(layers=(1,), width=32), image_size=(16, 16), num_classes=3))
    for model, conv in ((hybrid, hybrid.patch_embed.backbone.stem.conv), (bit, bit.stem.conv)):
        kernels = conv.weight.detach().double().flatten(1).numpy()
        expected = (kernels - kernels.mean(axis=1, keepdims=True)) / kernels.std(axis=1, keepdims=True)
        found = stem_filters(model)
        assert found.shape == (32, 3, 7, 7)
        assert found.flatten(1).numpy() == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="without a stem"):
        stem_filters(make_model())
