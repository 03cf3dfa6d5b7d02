"""Residual networks with weight standardisation and group normalisation: the stems of the paper's hybrids and its BiT
baselines.

    hybrids  post-activation, as in google-research/vision_transformer `vit_jax/models_resnet.py`
    BiT      pre-activation (v2), as in google-research/big_vision `models/bit_paper.py`; its head is in `vit/bit.py`

Where authors' code and timm differ in an epsilon or in padding, both are parameters. Parameter names follow timm's
`resnetv2`.

    B  batch      R  rows and columns of a
    W  width         feature map
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit.init import lecun_normal_

GROUPS = 32
EXPANSION = 4
"""Channels after a bottleneck over channels within it."""

Padding = Literal["same", "fixed"]


@dataclass(frozen=True)
class ConvStyle:
    """How convolutions are standardised, padded and normalised.

    `weight_eps` is added to the standard deviation (`eps_on: std`) or to the variance (`eps_on: var`) of a kernel;
    `norm_eps` is group normalisation's. `padding: same` pads as TensorFlow does (at stride 2 more after than before),
    `fixed` by half the kernel on both sides.
    """

    weight_eps: float
    eps_on: Literal["std", "var"]
    norm_eps: float
    padding: Padding


OFFICIAL_HYBRID = ConvStyle(weight_eps=1e-5, eps_on="std", norm_eps=1e-6, padding="same")
"""google-research/vision_transformer `models_resnet.py`: flax's GroupNorm epsilon is 1e-6."""
TIMM_HYBRID = ConvStyle(weight_eps=1e-8, eps_on="var", norm_eps=1e-5, padding="same")
"""timm `vision_transformer_hybrid.py`: StdConv2dSame."""
OFFICIAL_BIT = ConvStyle(weight_eps=1e-10, eps_on="var", norm_eps=1e-5, padding="fixed")
"""google-research/big_vision `bit_paper.py`."""
TIMM_BIT = ConvStyle(weight_eps=1e-8, eps_on="var", norm_eps=1e-5, padding="fixed")
"""timm `resnetv2.py` (and Transformers `modeling_bit.py`)."""


class StdConv2d(nn.Conv2d):
    """A convolution without bias whose kernels are standardised over (in channels, height, width) at each use:
    mean 0, variance 1 per output channel (Qiao et al., 2019)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, style: ConvStyle) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, bias=False)
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        x, padding = padded(x, self.kernel_size[0], self.stride[0], self.style.padding)
        return F.conv2d(x, self.standardized(), stride=self.stride, padding=padding)

    def standardized(self) -> Tensor:
        """The kernels that are convolved with, in the parameter's own precision."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        if self.style.eps_on == "var":
            return (self.weight - mean) * torch.rsqrt(variance + self.style.weight_eps)
        return (self.weight - mean) / (variance.sqrt() + self.style.weight_eps)

    def init_weights(self, generator: torch.Generator) -> None:
        lecun_normal_(self.weight, generator)


def padded(x: Tensor, kernel: int, stride: int, padding: Padding) -> tuple[Tensor, tuple[int, int]]:
    """`x`, (B, W, R, R), and the zeros (rows, columns) its convolution or pooling has still to add on both sides.

    Only where one side gets more than the other is `x` copied: autograd would keep the copy.
    """
    if padding == "fixed":
        return x, ((kernel - 1) // 2, (kernel - 1) // 2)
    rows, columns = (same_padding(side, kernel, stride) for side in x.shape[-2:])
    if rows % 2 == columns % 2 == 0:
        return x, (rows // 2, columns // 2)
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)), (0, 0)


def same_padding(side: int, kernel: int, stride: int) -> int:
    """Zeros that TensorFlow's SAME adds along a side of `side` pixels; the odd one comes after."""
    return max((-(-side // stride) - 1) * stride + kernel - side, 0)


class Stem(nn.Module):
    """7 x 7 convolution at stride 2, then 3 x 3 maximum at stride 2: (B, channels, 4R, 4R) -> (B, W, R, R).

    A post-activation network normalises in between (`norm`), a pre-activation one does not.
    """

    def __init__(self, in_channels: int, width: int, *, normalize: bool, style: ConvStyle) -> None:
        super().__init__()
        self.conv = StdConv2d(in_channels, width, 7, stride=2, style=style)
        self.norm = group_norm(width, style) if normalize else None
        self.padding = style.padding

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images)
        if self.norm is not None:
            x = F.relu(self.norm(x))
        if self.padding == "fixed":
            # BiT's maximum sees zeros at the border, not minus infinity.
            return F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
        # After ReLU a border of zeros and one of minus infinity are the same.
        x, padding = padded(x, 3, 2, self.padding)
        return F.max_pool2d(x, 3, 2, padding)

    def init_weights(self, generator: torch.Generator) -> None:
        self.conv.init_weights(generator)
        if self.norm is not None:
            init_norm(self.norm)


class Downsample(nn.Module):
    """The shortcut's 1 x 1 convolution where shape changes; normalised in a post-activation network."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, normalize: bool, style: ConvStyle) -> None:
        super().__init__()
        self.conv = StdConv2d(in_channels, out_channels, 1, stride=stride, style=style)
        self.norm = group_norm(out_channels, style) if normalize else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)

    def init_weights(self, generator: torch.Generator) -> None:
        self.conv.init_weights(generator)
        if self.norm is not None:
            init_norm(self.norm)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride), 1 x 1 convolution beside a shortcut; (B, W, R, R) -> (B, W', R / stride, ...).

    `preact` normalises and rectifies before each convolution and adds without a ReLU after (BiT); otherwise both come
    after (the hybrids' stem).
    """

    def __init__(self, in_channels: int, width: int, *, stride: int, preact: bool, style: ConvStyle) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        self.preact = preact
        self.conv1 = StdConv2d(in_channels, width, 1, style=style)
        self.norm1 = group_norm(in_channels if preact else width, style)
        self.conv2 = StdConv2d(width, width, 3, stride=stride, style=style)
        self.norm2 = group_norm(width, style)
        self.conv3 = StdConv2d(width, out_channels, 1, style=style)
        self.norm3 = group_norm(width if preact else out_channels, style)
        changes = stride != 1 or in_channels != out_channels
        self.downsample = (
            Downsample(in_channels, out_channels, stride=stride, normalize=not preact, style=style) if changes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._preact(x) if self.preact else self._postact(x)

    def _preact(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        y = self.conv1(activated)
        y = self.conv2(F.relu(self.norm2(y)))
        y = self.conv3(F.relu(self.norm3(y)))
        # Autocast's convolutions give bfloat16; the sum is kept in fp32, as a post-activation network's is.
        return _widened(y) + _widened(shortcut)

    def _postact(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + shortcut)

    def init_weights(self, generator: torch.Generator) -> None:
        for conv in (self.conv1, self.conv2, self.conv3):
            conv.init_weights(generator)
        for norm in (self.norm1, self.norm2, self.norm3):
            init_norm(norm)
        if not self.preact:
            # The block begins as its shortcut (models_resnet.py: gn3 scale_init zeros).
            nn.init.zeros_(self.norm3.weight)
        if self.downsample is not None:
            self.downsample.init_weights(generator)


class Stage(nn.Module):
    """`depth` bottlenecks; the first has the stride."""

    def __init__(
        self, in_channels: int, width: int, depth: int, *, stride: int, preact: bool, style: ConvStyle
    ) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        self.blocks = nn.ModuleList(
            Bottleneck(
                in_channels if index == 0 else out_channels,
                width,
                stride=stride if index == 0 else 1,
                preact=preact,
                style=style,
            )
            for index in range(depth)
        )


class ResNetBackbone(nn.Module):
    """Stem and stages: images (B, channels, height, width) -> feature map (B, `num_features`, height / `stride`, ...).

    `layers` counts the bottlenecks of each stage, whose widths are `width`, 2 `width`, 4 `width`, ...; none leaves the
    stem alone. Sides are rounded up at each stride of 2 with `same` padding.
    """

    def __init__(self, layers: Sequence[int], *, width: int, in_channels: int, preact: bool, style: ConvStyle) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.stem = Stem(in_channels, width, normalize=not preact, style=style)
        stages: list[Stage] = []
        channels = width
        for index, depth in enumerate(layers):
            stage_width = width * 2**index
            stride = 1 if index == 0 else 2
            stages.append(Stage(channels, stage_width, depth, stride=stride, preact=preact, style=style))
            channels = stage_width * EXPANSION
        self.stages = nn.ModuleList(stages)
        self.num_features = channels
        self.stride = backbone_stride(len(layers))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = self.run_stage(stage, x)
        return x

    def run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        """What a stage of this network makes of the feature map before it; its blocks are recomputed in the backward
        pass where that is asked for."""
        assert isinstance(stage, Stage)
        for block in stage.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x

    def init_weights(self, generator: torch.Generator) -> None:
        """Kernels as flax's default (LeCun normal), group norms 1 and 0."""
        self.stem.init_weights(generator)
        for stage in self.stages:
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                assert isinstance(block, Bottleneck)
                block.init_weights(generator)


def backbone_stride(num_stages: int) -> int:
    """Pixels per side of a feature: the stem's 4, doubled by each stage but the first."""
    return 4 * 2 ** max(num_stages - 1, 0)


class GroupNorm(nn.GroupNorm):
    """In fp32 whatever autocast says: CUDA does so by itself, the CPU would not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_widened(x))


def group_norm(channels: int, style: ConvStyle) -> nn.GroupNorm:
    return GroupNorm(GROUPS, channels, eps=style.norm_eps)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype is torch.bfloat16 else x


def init_norm(norm: nn.GroupNorm) -> None:
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
