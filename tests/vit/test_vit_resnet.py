"""Residual backbones against timm's, from random weights, and against TensorFlow's arithmetic."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vit.resnet import (
    OFFICIAL_BIT,
    OFFICIAL_HYBRID,
    TIMM_BIT,
    TIMM_HYBRID,
    ConvStyle,
    ResNetBackbone,
    StdConv2d,
    same_padding,
)


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.normal_(1.0, 0.2, generator=generator)
        else:
            parameter.normal_(0.0, 0.1, generator=generator)


def backbone(layers: tuple[int, ...], *, preact: bool, style: ConvStyle, width: int = 64) -> ResNetBackbone:
    return ResNetBackbone(layers, width=width, in_channels=3, preact=preact, style=style).eval()


@torch.no_grad()
@pytest.mark.parametrize(("height", "columns"), [(64, 64), (97, 64)])
def test_bit_is_timms(height: int, columns: int) -> None:
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=10).eval()
    randomize(theirs)
    ours = backbone((3, 4, 6, 3), preact=True, style=TIMM_BIT)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith(("stem.", "stages."))}
    ours.load_state_dict(state)
    images = torch.randn(2, 3, height, columns, dtype=torch.float64)

    features = ours.double()(images)  # in fp64, where nothing but the arithmetic's order may differ

    expected = theirs.double().stages(theirs.stem(images))
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-9)
    assert features.shape[1] == ours.num_features == 2048


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layers"), [("vit_base_r50_s16_224", (3, 4, 9)), ("vit_small_r26_s32_224", (2, 2, 2, 2))]
)
@pytest.mark.parametrize("side", [64, 70])
def test_a_hybrids_stem_is_timms(name: str, layers: tuple[int, ...], side: int) -> None:
    theirs = timm.create_model(name, num_classes=10).patch_embed.backbone.eval()
    randomize(theirs)
    ours = backbone(layers, preact=False, style=TIMM_HYBRID)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, side, side, dtype=torch.float64)

    features, expected = ours.double()(images), theirs.double()(images)

    torch.testing.assert_close(features, expected, rtol=0, atol=1e-9)
    assert features.shape[1] == ours.num_features


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "expected"), [(224, 7, 2, 5), (112, 3, 2, 1), (7, 3, 2, 2), (14, 1, 2, 0)]
)
def test_same_padding_is_tensorflows(side: int, kernel: int, stride: int, expected: int) -> None:
    # ceil(side / stride) windows: tensorflow.org, "tf.nn" notes on padding.
    assert same_padding(side, kernel, stride) == expected


@torch.no_grad()
def test_the_odd_zero_of_same_padding_comes_after() -> None:
    style = ConvStyle(weight_eps=1e-5, eps_on="std", norm_eps=1e-6, padding="same")
    conv = StdConv2d(1, 1, 3, stride=2, style=style)
    images = torch.randn(1, 1, 8, 8)

    expected = F.conv2d(F.pad(images, (0, 1, 0, 1)), conv.standardized(), stride=2)

    assert torch.equal(conv(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("style", [OFFICIAL_HYBRID, TIMM_HYBRID, OFFICIAL_BIT, TIMM_BIT])
def test_kernels_have_mean_0_and_variance_1(style: ConvStyle) -> None:
    conv = StdConv2d(8, 4, 3, style=style)
    kernel = conv.weight.double()
    mean = kernel.mean(dim=(1, 2, 3), keepdim=True)
    std = kernel.std(dim=(1, 2, 3), keepdim=True, correction=0)
    divisor = std + style.weight_eps if style.eps_on == "std" else (std**2 + style.weight_eps).sqrt()

    torch.testing.assert_close(conv.standardized().double(), (kernel - mean) / divisor, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_official_epsilons_are_not_timms() -> None:
    official = backbone((1,), preact=False, style=OFFICIAL_HYBRID)
    other = backbone((1,), preact=False, style=TIMM_HYBRID)
    randomize(official)
    for parameter in official.parameters():
        if parameter.ndim == 4:
            parameter.mul_(1e-3)  # where a kernel is small the epsilon tells
    other.load_state_dict(official.state_dict())
    images = torch.randn(1, 3, 32, 32)

    assert (official(images) - other(images)).abs().max() > 1e-3


@torch.no_grad()
def test_a_post_activation_block_begins_as_its_shortcut() -> None:
    model = backbone((2,), preact=False, style=OFFICIAL_HYBRID)
    model.init_weights(torch.Generator().manual_seed(0))
    block = model.stages[0].blocks[1]
    x = torch.rand(1, 256, 8, 8)

    assert torch.equal(block(x), x)


def test_checkpointing_changes_no_gradient() -> None:
    model = backbone((1, 1), preact=True, style=OFFICIAL_BIT).train()
    model.init_weights(torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        model.activation_checkpointing = enabled
        model(images).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
