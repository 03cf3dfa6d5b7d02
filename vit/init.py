"""The official initialisers (google-research/vision_transformer `vit_jax/models_vit.py`; flax `nn.initializers`).

All draw from the generator they are given and never from the global one, so that every rank makes the same weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a unit normal cut at two standard deviations; flax divides by it, `trunc_normal_` does not."""


def xavier_uniform_(kernel: Tensor, generator: torch.Generator) -> None:
    """Fill a (out, in) kernel from U(-a, a), a = sqrt(6 / (in + out)). Call it for q, k and v separately: the fused
    (3D, D) kernel has another fan-out."""
    nn.init.xavier_uniform_(kernel, generator=generator)


def lecun_normal_(kernel: Tensor, generator: torch.Generator) -> None:
    """Fill a (out, in, ...) kernel from a normal of variance 1 / fan_in, cut at two standard deviations, its width
    corrected for the cut."""
    fan_in = kernel[0].numel()
    std = math.sqrt(1.0 / fan_in) / TRUNCATED_STD
    nn.init.trunc_normal_(kernel, mean=0.0, std=std, a=-2.0 * std, b=2.0 * std, generator=generator)


def normal_(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill from N(0, std)."""
    nn.init.normal_(tensor, mean=0.0, std=std, generator=generator)
