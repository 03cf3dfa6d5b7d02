"""Safetensors files that name their tensors as timm or Transformers do: which model they are, from the shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from configs.imports import ImportModel
from configs.model import VARIANTS, BitConfig, Gelu, Pool, StemConfig, VitConfig
from vit.formats.official import square_or

UNKNOWN_LAYER_SCALE = 1e-4
"""A file has the factors of LayerScale, not where they started: this is put down for it (DeiT-III's start)."""
HEADS_BY_WIDTH = {embed_dim: heads for embed_dim, _, heads, _ in VARIANTS.values()}
"""The published sizes: a file of timm's or Transformers' does not say its number of heads."""

_HF_RENAMED = (
    (r"^vit\.", ""),
    (r"^encoder\.layer\.", "layers."),  # Transformers 4, and every file; 5 has `layers.` at run time
    (r"^layers\.", "blocks."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.dense\.", "pre_logits."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)


def is_transformers(names: object) -> bool:
    """Whether these are the names of a Transformers ViT."""
    return any("embeddings.patch_embeddings.projection." in name for name in names)  # type: ignore[attr-defined]


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for a Transformers ViT's tensors, of either key style; query, key and value joined.

    Raises:
        ValueError: a layer has not all three of query, key and value, or a tensor is there under two names.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in _HF_RENAMED:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ValueError(f"{name} is there twice, under the names of two versions of Transformers")
        renamed[new] = tensor
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace(".attn.query.", f".attn.{part}.") for part in ("query", "key", "value")]
        absent = [part for part in parts if part not in renamed]
        if absent:
            raise ValueError(f"weights are incomplete, missing: {', '.join(absent)}")
        renamed[name.replace(".attn.query.", ".attn.qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def infer_config(state: Mapping[str, Tensor], wanted: ImportModel, gelu: Gelu) -> VitConfig:
    """The configuration of a model with timm's names; `num_classes` 1 where it has no head.

    Raises:
        ValueError: a tensor that tells a size is missing or has other dimensions, or the number of heads is not known.
    """
    embed_dim, patch_channels, patch_size = _shape(state, "patch_embed.proj.weight", 4)[:3]
    depth = len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})
    stem = _infer_stem(state)
    registers = _shape(state, "reg_token", 3)[1] if "reg_token" in state else 0
    num_prefix = registers + (1 if "cls_token" in state else 0)
    qk_norm = "blocks.0.attn.q_norm.weight"
    head_dim = _shape(state, qk_norm, 1)[0] if qk_norm in state else None
    stride = patch_size * (stem.stride if stem is not None else 1)
    return VitConfig.model_validate(
        {
            "patch_size": patch_size,
            "stem": stem,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": _num_heads(embed_dim, wanted.num_heads, head_dim),
            "mlp_dim": _shape(state, "blocks.0.mlp.fc1.weight", 2)[0],
            "image_size": _image_size(state, wanted, stride, num_prefix),
            "in_channels": patch_channels if stem is None else _shape(state, _root(state), 4)[1],
            "num_classes": _shape(state, "head.weight", 2)[0] if "head.weight" in state else 1,
            "head": "mlp" if "pre_logits.weight" in state else "linear",
            "pool": _pool(state),
            "registers": registers,
            "qk_norm": head_dim is not None,
            "layer_scale": UNKNOWN_LAYER_SCALE if "blocks.0.ls1.gamma" in state else None,
            "gelu": wanted.gelu or gelu,
            "pos_embed": "learned" if "pos_embed" in state else "none",
        }
    )


def is_timm_resnet(names: object) -> bool:
    """Whether these are the names of a timm `resnetv2`."""
    return "stages.0.blocks.0.conv1.weight" in names  # type: ignore[operator]


def infer_resnet(state: Mapping[str, Tensor], wanted: ImportModel) -> BitConfig:
    """The configuration of a BiT ResNet with timm's names; `num_classes` 1 where it has no head, images of 224 pixels
    unless the user says otherwise: a ResNet does not depend on it.

    Raises:
        ValueError: a tensor that tells a size is missing or has other dimensions.
    """
    root = _shape(state, "stem.conv.weight", 4)
    size = wanted.image_size or 224
    return BitConfig.model_validate(
        {
            "resnet": {"layers": _stages(state, ""), "width": root[0], "numerics": "timm"},
            "image_size": (size, size) if isinstance(size, int) else size,
            "in_channels": root[1],
            "num_classes": _shape(state, "head.fc.weight", 4)[0] if "head.fc.weight" in state else 1,
        }
    )


def _stages(state: Mapping[str, Tensor], prefix: str) -> list[int]:
    """Bottlenecks of each stage."""
    pattern = re.compile(re.escape(prefix) + r"stages\.(\d{1,2})\.blocks\.(\d{1,3})\.")
    found = {(int(match[1]), int(match[2])) for name in state if (match := pattern.match(name))}
    stages = 1 + max((stage for stage, _ in found), default=-1)
    return [sum(1 for stage, _ in found if stage == number) for number in range(stages)]


def _pool(state: Mapping[str, Tensor]) -> Pool:
    if "cls_token" not in state:
        return "map" if "attn_pool.latent" in state else "gap"
    return "patch_mean" if "fc_norm.weight" in state else "cls"


def _num_heads(embed_dim: int, given: int | None, head_dim: int | None) -> int:
    """Query-key norms are as wide as a head."""
    if given is not None:
        return given
    if head_dim is not None and embed_dim % head_dim == 0:
        return embed_dim // head_dim
    if embed_dim not in HEADS_BY_WIDTH:
        known = ", ".join(f"{dim}: {heads}" for dim, heads in sorted(HEADS_BY_WIDTH.items()))
        raise ValueError(
            f"the file does not say how many heads its attention of width {embed_dim} has: give model.num_heads "
            f"(known without it are {known})"
        )
    return HEADS_BY_WIDTH[embed_dim]


def _image_size(state: Mapping[str, Tensor], wanted: ImportModel, stride: int, num_prefix: int) -> tuple[int, int]:
    """timm's models without positions for class token and registers (`no_embed_class`) have so many fewer."""
    size = wanted.image_size
    given = (size, size) if isinstance(size, int) else size
    if "pos_embed" not in state:
        if given is None:
            raise ValueError("the file has no positions (pos_embed) that tell the image's size: give model.image_size")
        return given
    positions = _shape(state, "pos_embed", 3)[1]
    if num_prefix:
        side = round(max(positions - num_prefix, 0) ** 0.5)
        is_whole = round(positions**0.5) ** 2 == positions
        if given is None and is_whole and side * side == positions - num_prefix:
            raise ValueError(
                f"the file's {positions} positions may be those of the patches alone or with {num_prefix} more tokens: "
                "give model.image_size"
            )
        if given is None and side * side != positions - num_prefix:
            return square_or(None, positions, stride)
        if given is not None and (given[0] // stride) * (given[1] // stride) == positions:
            return square_or(given, positions, stride)
        positions -= num_prefix
    return square_or(given, positions, stride)


def _infer_stem(state: Mapping[str, Tensor]) -> StemConfig | None:
    root = _root(state)
    if root not in state:
        return None
    layers = _stages(state, "patch_embed.backbone.")
    return StemConfig.model_validate({"layers": layers, "width": state[root].shape[0], "numerics": "timm"})


def _root(state: Mapping[str, Tensor]) -> str:
    named = "patch_embed.backbone.stem.conv.weight"
    return named if named in state else "patch_embed.backbone.conv.weight"


def _shape(state: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(f"this is no Vision Transformer in timm's names: {name} is missing")
    shape = tuple(state[name].shape)
    if len(shape) != dims:
        raise ValueError(f"{name} has shape {shape}, expected {dims} dimensions")
    return shape
