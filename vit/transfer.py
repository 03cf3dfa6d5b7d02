"""Weights for another task or resolution: fine-tuning drops the head, evaluation keeps it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from configs.model import POOL_CHANGES, BitConfig, NetworkConfig, VitConfig
from vit.pos_embed import resize_axis, resize_pos_embed, sincos2d
from vit.state import check_weights

BODY_FIELDS = (
    "patch_size",
    "stem",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_dim",
    "in_channels",
    "registers",
    "qk_norm",
    "gelu",
    "pos_embed",
    "pos_embed_at",
)
"""What source and target must share, beside pooling and LayerScale; image size, classes, head and dropout may
differ."""
HEAD_FIELDS = ("num_classes", "head")
HEAD_PREFIXES = ("pre_logits.", "head.", "mask_token")


def transfer_weights(
    state: Mapping[str, Tensor], source: NetworkConfig, target: NetworkConfig, keep_head: bool = False
) -> dict[str, Tensor]:
    """Everything but the head, for a model of another resolution and other classes: `pre_logits`, `head` and the
    [mask] are dropped whole (paper, D.3) and the positions resized by `target.pos_resize`. From `pool: cls` to
    `patch_mean` the final norm is dropped too, for the new one after the mean (facebookresearch/mae `models_vit.py`).

    Fine-tuning starts from `vit.build(target).state_dict() | transfer_weights(...)`, whose head is zero, or with
    `keep_head` the source's.

    Raises:
        ValueError: `state` is not a complete model of `source`, or the two bodies (with `keep_head` the heads too)
            differ.
    """
    if isinstance(source, BitConfig) or isinstance(target, BitConfig):
        _check_same_resnet("transfer", ("num_classes",) if keep_head else (), source, target)
        check_weights(state, source)
        return {name: tensor for name, tensor in state.items() if keep_head or not name.startswith(HEAD_PREFIXES)}
    _check_same("transfer", BODY_FIELDS + HEAD_FIELDS if keep_head else BODY_FIELDS, source, target)
    pools_differ = source.pool != target.pool
    if pools_differ and (source.pool, target.pool) not in POOL_CHANGES:
        _check_same("transfer", ("pool",), source, target)
    check_weights(state, source)
    dropped = (() if keep_head else HEAD_PREFIXES) + (("norm.",) if pools_differ else ())
    body = {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}
    return body | _resized_positions(body, source, target)


def resize_weights(state: Mapping[str, Tensor], source: NetworkConfig, target: NetworkConfig) -> dict[str, Tensor]:
    """The same model, head included, for another image size: only the positions change, by `target.pos_resize`.

    Raises:
        ValueError: `state` is not a complete model of `source`, more than the image size differs, or its positions
            are relative.
    """
    if isinstance(source, BitConfig) or isinstance(target, BitConfig):
        _check_same_resnet("resize", ("num_classes",), source, target)
        check_weights(state, source)
        return dict(state)
    _check_same("resize", ("pool", *BODY_FIELDS, *HEAD_FIELDS), source, target)
    check_weights(state, source)
    return dict(state) | _resized_positions(state, source, target)


def _resized_positions(state: Mapping[str, Tensor], source: VitConfig, target: VitConfig) -> dict[str, Tensor]:
    """The positions on the target's grid, under their names: those of the stem, or of every block."""
    if source.pos_embed == "relative" and source.grid != target.grid:
        raise ValueError(
            f"cannot resize pos_embed relative from a grid of {source.grid} to {target.grid}: the same 1-D offset is "
            "another displacement there"
        )
    return {
        name: _resized(name, tensor, source, target)
        for name, tensor in state.items()
        if name.endswith(("pos_embed", "pos_embed.x", "pos_embed.y"))
    }


def _resized(name: str, tensor: Tensor, source: VitConfig, target: VitConfig) -> Tensor:
    if name.endswith(".x"):
        return resize_axis(tensor, target.grid[1], target.pos_resize)
    if name.endswith(".y"):
        return resize_axis(tensor, target.grid[0], target.pos_resize)
    if target.pos_embed == "sincos2d" and source.grid != target.grid:
        return sincos2d(target.grid, target.embed_dim, target.num_prefix)
    return resize_pos_embed(tensor, source.grid, target.grid, source.num_prefix, target.pos_resize)


def _check_same_resnet(action: str, fields: tuple[str, ...], source: NetworkConfig, target: NetworkConfig) -> None:
    """A ResNet's weights fit any image size."""
    _check_equal(action, ("resnet", "in_channels", *fields), source, target)


def _check_same(action: str, fields: tuple[str, ...], source: VitConfig, target: VitConfig) -> None:
    _check_equal(action, fields, source, target)
    # Where the factors started is of no account: they are in the checkpoint.
    if (source.layer_scale is None) != (target.layer_scale is None):
        raise ValueError(
            f"cannot {action} weights: layer_scale is {source.layer_scale!r} in the checkpoint and "
            f"{target.layer_scale!r} in the model"
        )


def _check_equal(action: str, fields: tuple[str, ...], source: NetworkConfig, target: NetworkConfig) -> None:
    for field in fields:
        have, want = getattr(source, field, None), getattr(target, field, None)
        if have != want:
            raise ValueError(
                f"cannot {action} weights: {field} is {have!r} in the checkpoint and {want!r} in the model"
            )
