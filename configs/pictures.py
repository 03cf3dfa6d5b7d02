"""The pictures of a model that an inspect job draws, and which models have them (paper, 4.5, D.7, D.8)."""

from __future__ import annotations

from typing import Literal, get_args

from configs.model import BitConfig, NetworkConfig

PictureName = Literal["patch_filters", "position_similarity", "attention_distance", "attention_rollout", "stem_filters"]
PICTURES: tuple[PictureName, ...] = get_args(PictureName)
READ_IMAGES: frozenset[PictureName] = frozenset({"attention_distance", "attention_rollout"})
"""The others show weights only."""


def why_not(name: PictureName, model: NetworkConfig) -> str | None:
    """Why a model has no such picture; None if it has."""
    if isinstance(model, BitConfig):
        return None if name == "stem_filters" else "is of a Vision Transformer, the checkpoint is a ResNet"
    if name == "patch_filters" and model.stem is not None:
        return "is of patches of the image, the checkpoint is a hybrid, whose patches are of features"
    if name == "stem_filters" and model.stem is None:
        return "is of a hybrid or a ResNet, the checkpoint has no convolutional stem"
    if name == "position_similarity" and model.pos_embed == "none":
        return "needs position embeddings, the checkpoint has none (pos_embed none)"
    return None


def pictures_of(model: NetworkConfig) -> tuple[PictureName, ...]:
    """Every picture there is of a model; at least one."""
    return tuple(name for name in PICTURES if why_not(name, model) is None)
