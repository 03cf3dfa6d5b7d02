"""The BiT ResNets that the paper compares with (4.1): pre-activation, weights standardised, group norm.

google-research/big_vision `models/bit_paper.py`; names of parameters follow timm's `resnetv2`, but for the classifier,
which is dense here.

    B  batch      F  features      R  rows and columns of the feature map      C  classes
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import BitConfig
from configs.wire import Preprocess
from vit.resnet import OFFICIAL_BIT, TIMM_BIT, ResNetBackbone, group_norm, init_norm


class BiT(ResNetBackbone):
    """A ResNet of any depth and width on images of any size: stem, stages, norm and ReLU, mean, dense classifier.

    Its weights are torch's defaults until `init_weights`; `vit.build` makes an initialised one.
    """

    def __init__(self, config: BitConfig) -> None:
        resnet = config.resnet
        style = OFFICIAL_BIT if resnet.numerics == "official" else TIMM_BIT
        super().__init__(resnet.layers, width=resnet.width, in_channels=config.in_channels, preact=True, style=style)
        self.config = config
        self.preprocess: Preprocess | None = None
        """How images are prepared for these weights; set by `vit.load`."""
        self.norm = group_norm(self.num_features, style)
        self.head = nn.Linear(self.num_features, config.num_classes)

    def forward(self, images: Tensor, representation: bool = False) -> Tensor:
        """Logits, (B, C), of normalised float images (B, channels, height, width); or what the classifier reads."""
        features = self.forward_features(images)
        return self.forward_representation(features) if representation else self.forward_head(features)

    def forward_features(self, images: Tensor) -> Tensor:
        """The feature map after the last norm and ReLU, (B, F, R, R).

        Raises:
            ValueError: the images' channels or size are not those of the configuration.
        """
        self._check_images(images)
        return F.relu(self.norm(super().forward(images)))

    def forward_intermediates(self, images: Tensor, indices: Sequence[int], norm: bool = False) -> list[Tensor]:
        """What the stages of these numbers give, in their order, as feature maps (B, width of the stage, R, R). Stages
        after the last one are not run.

        Args:
            indices: numbers of stages; negative ones count from the last.
            norm: the last norm and ReLU are applied to the map of the last stage, the only one they fit.

        Raises:
            ValueError: no or an unknown stage is named, `norm` is asked for another stage than the last, or the images
                are not those of `forward_features`.
        """
        depth = len(self.stages)
        wanted = {index + depth if index < 0 else index for index in indices}
        if not wanted or min(wanted) < 0 or max(wanted) >= depth:
            raise ValueError(f"indices {list(indices)}: expected at least one of {-depth} to {depth - 1}")
        if norm and wanted != {depth - 1}:
            raise ValueError(f"norm fits stage {depth - 1} only, indices are {list(indices)}")
        self._check_images(images)
        maps = []
        x = self.stem(images)
        for index, stage in enumerate(self.stages[: max(wanted) + 1]):
            x = self.run_stage(stage, x)
            if index in wanted:
                maps.append(F.relu(self.norm(x)) if norm else x)
        return maps

    def forward_representation(self, features: Tensor) -> Tensor:
        """The vector that the classifier reads, (B, F), of the map that `forward_features` gives: its mean."""
        return features.mean(dim=(2, 3))

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits, (B, C), of the map that `forward_features` gives."""
        return self.head(self.forward_representation(features))

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each bottleneck in the backward pass instead of keeping its activations (training only)."""
        self.activation_checkpointing = enabled

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Set every parameter as the official code does; the head's kernel is zero, so all logits are its bias."""
        super().init_weights(generator)
        init_norm(self.norm)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, self.config.head_bias_init)

    def _check_images(self, images: Tensor) -> None:
        expected = (self.config.in_channels, *self.config.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images have shape {tuple(images.shape[1:])} each, this model takes {expected}")
