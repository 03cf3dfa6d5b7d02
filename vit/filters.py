"""The first filters of a model: of the patch embedding, as principal components, and of a convolutional stem.

Paper, 4.5 and figure 7 (left).

    D  embed dim or        P  side of a filter
       channels            F  values of a filter, channels * P * P
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vit.bit import BiT
from vit.model import Network, ViT

NUM_COMPONENTS = 28
"""As many as the paper's figure shows."""


class Components(NamedTuple):
    """Principal components of filters, the strongest first."""

    filters: Tensor
    """fp32 (n, channels, P, P), each of length 1; the value farthest from 0 is positive."""
    explained: Tensor
    """fp32 (n,): the share of the filters' variance along each."""


@torch.no_grad()
def principal_components(filters: Tensor, count: int = NUM_COMPONENTS) -> Components:
    """Those of D filters, (D, channels, P, P), about their mean; fewer than `count` where the filters have no more
    directions. A component's sign means nothing, and is chosen."""
    flat = filters.double().flatten(1)  # (D, F)
    _, strengths, directions = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    count = min(count, flat.shape[1], max(flat.shape[0] - 1, 1))
    chosen = directions[:count]  # (n, F)
    peaks = chosen.gather(1, chosen.abs().argmax(dim=1, keepdim=True))
    variance = strengths.square()
    explained = variance[:count] / variance.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Components((chosen * peaks.sign()).unflatten(1, filters.shape[1:]).float(), explained.float())


def patch_filters(model: ViT) -> Tensor:
    """The filters that make tokens of patches of the image, (D, channels, P, P).

    Raises:
        ValueError: the model is a hybrid, whose patches are of a feature map and cannot be looked at as images.
    """
    if model.patch_embed.backbone is not None:
        raise ValueError("a hybrid's patch filters act on the features of its stem, not on the image")
    return model.patch_embed.proj.weight.detach()


@torch.no_grad()
def stem_filters(model: Network) -> Tensor:
    """The first convolution's filters as they are applied, standardised, (D, channels, 7, 7), of a hybrid or a ResNet.

    Raises:
        ValueError: the model has no convolutional stem.
    """
    backbone = model if isinstance(model, BiT) else model.patch_embed.backbone
    if backbone is None:
        raise ValueError("a Vision Transformer without a stem has no convolution but its patch embedding")
    return backbone.stem.conv.standardized()
