"""What a complete set of weights is: the names, shapes and values a model of a given configuration takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from configs.model import NetworkConfig
from vit.model import empty

_SHOWN = 5


def expected_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, in the model's order."""
    return {name: tuple(tensor.shape) for name, tensor in empty(config).state_dict().items()}


def check_weights(state: Mapping[str, Tensor], config: NetworkConfig) -> None:
    """Nothing, if `state` is a complete and finite set of weights for `config`.

    Raises:
        ValueError: weights are missing, unexpected, of another shape, or not finite; names the first.
    """
    shapes = expected_shapes(config)
    missing = [name for name in shapes if name not in state]
    if missing:
        raise ValueError(f"weights are incomplete, missing: {_shown(missing)}")
    unexpected = [name for name in state if name not in shapes]
    if unexpected:
        raise ValueError(f"weights do not belong to this model: {_shown(unexpected)}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {shape}")
    for name in shapes:
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"{name} holds NaN or infinite values")


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
