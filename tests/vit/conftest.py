from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from configs.model import VitConfig
from vit import ViT, build

MakeConfig = Callable[..., VitConfig]
MakeModel = Callable[..., ViT]


@pytest.fixture
def make_config() -> MakeConfig:
    """A ViT small enough for a unit test; any field may be overridden."""

    def make(**fields: Any) -> VitConfig:
        tiny = {
            "patch_size": 4,
            "embed_dim": 16,
            "depth": 3,
            "num_heads": 2,
            "mlp_dim": 24,
            "image_size": (16, 16),
            "num_classes": 7,
        }
        return VitConfig(**(tiny | fields))

    return make


@pytest.fixture
def make_model(make_config: MakeConfig) -> MakeModel:
    """A tiny ViT whose every parameter is random: zero heads and unit norms would hide mistakes."""

    def make(**fields: Any) -> ViT:
        model = build(make_config(**fields))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model.eval()

    return make
