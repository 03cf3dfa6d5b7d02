"""The cost of residual networks against the modules and against what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configs.conv_cost import Backbone
from vit.resnet import OFFICIAL_BIT, OFFICIAL_HYBRID, ResNetBackbone

SHAPES = [((), (64, 64)), ((2, 1, 3), (96, 64)), ((1, 2, 1, 1), (60, 60)), ((2, 2), (61, 75))]


def module(cost: Backbone) -> ResNetBackbone:
    style = OFFICIAL_BIT if cost.preact else OFFICIAL_HYBRID
    made = ResNetBackbone(cost.layers, width=cost.width, in_channels=cost.in_channels, preact=cost.preact, style=style)
    made.init_weights(torch.Generator().manual_seed(0))
    return made.train()


def kept_bytes(model: ResNetBackbone, images: Tensor, *, is_bf16: bool) -> int:
    """Bytes of all distinct storages that autograd keeps for the backward pass, the parameters' own left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_bf16),
    ):
        # What reads the features keeps them as it reads them: a convolution, as a patch embedding is.
        torch.nn.functional.conv2d(model(images), torch.ones(1, model.num_features, 1, 1, requires_grad=True))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("preact", [False, True])
@pytest.mark.parametrize(("layers", "image_hw"), SHAPES)
def test_parameters_operations_and_the_feature_map(
    layers: tuple[int, ...], image_hw: tuple[int, int], preact: bool
) -> None:
    cost = Backbone(layers, 32, 3, image_hw, preact)
    model = module(cost)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model(torch.randn(1, 3, *image_hw))

    assert sum(p.numel() for p in model.parameters()) == cost.num_parameters
    assert counter.get_total_flops() == 2 * cost.macs
    assert features.shape[1:] == (cost.num_features, *cost.feature_hw)


@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("preact", [False, True])
@pytest.mark.parametrize(("layers", "image_hw"), SHAPES)
def test_what_autograd_keeps(layers: tuple[int, ...], image_hw: tuple[int, int], preact: bool, is_bf16: bool) -> None:
    cost = Backbone(layers, 32, 3, image_hw, preact)
    batch = 4
    images = torch.randn(batch, 3, *image_hw)
    found = kept_bytes(module(cost), images, is_bf16=is_bf16)
    rows, columns = cost.feature_hw
    read = cost.num_features * rows * columns
    copied = 2 * read if is_bf16 else 4 * read if preact else 0

    modelled = batch * (cost.saved_bytes(is_bf16) + copied) + cost.kernel_copy_bytes(is_bf16)
    assert modelled == pytest.approx(found, rel=0.01)


def test_hybrids_and_bit_have_their_published_sizes() -> None:
    # timm's results table: BiT R50x1 25.55 M with 1000 classes; Kolesnikov et al. 2019 give no finer figure.
    assert Backbone((3, 4, 6, 3), 64, 3, (224, 224), preact=True).num_parameters + 2 * 2048 + 2049 * 1000 == 25_549_352
