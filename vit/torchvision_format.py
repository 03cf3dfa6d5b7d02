"""Weights for torchvision (`torchvision.models.VisionTransformer`) and from it.

torchvision's GELU is the exact one, its LayerNorm's epsilon 1e-6, its positions hold the class token's, and with
`representation_size` it has our `head: mlp`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.model import NetworkConfig, VitConfig
from configs.wire import ModelFile
from vit.safetensors_file import write_safetensors
from vit.state import check_weights
from vit.transformers_format import plain_vit

_TO_THEIRS = (
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^norm\.", "encoder.ln."),
    (r"^pre_logits\.", "heads.pre_logits."),
    (r"^head\.", "heads.head."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm1\.", ".ln_1."),
    (r"\.norm2\.", ".ln_2."),
    (r"\.attn\.qkv\.(weight|bias)$", r".self_attention.in_proj_\1"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)
_FROM_THEIRS = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.pre_logits\.", "pre_logits."),
    (r"^heads\.head\.", "head."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_1\.", ".norm1."),
    (r"\.ln_2\.", ".norm2."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),  # linear_1: files of before torchvision 0.13
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
)


def is_torchvision(names: object) -> bool:
    """Whether these are the names of a torchvision ViT."""
    return "encoder.pos_embedding" in names  # type: ignore[operator]


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for a torchvision ViT's tensors."""
    return {_renamed(name, _FROM_THEIRS): tensor for name, tensor in state.items()}


def to_torchvision(state: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """torchvision's state dict of the model made with `torchvision_arguments(config)`: equal logits.

    Raises:
        ValueError: torchvision's ViT has not all parts of the model, or `state` is not a complete set of weights.
    """
    _torchvision_vit(config)
    check_weights(state, config)
    return {_renamed(name, _TO_THEIRS): tensor for name, tensor in state.items()}


def torchvision_arguments(config: VitConfig) -> dict[str, Any]:
    """Keyword arguments of `torchvision.models.VisionTransformer` for the same function; all JSON."""
    return {
        "image_size": config.image_size[0],
        "patch_size": config.patch_size,
        "num_layers": config.depth,
        "num_heads": config.num_heads,
        "hidden_dim": config.embed_dim,
        "mlp_dim": config.mlp_dim,
        "dropout": config.dropout,
        "num_classes": config.num_classes,
        "representation_size": config.embed_dim if config.head == "mlp" else None,
    }


def save_torchvision(state: Mapping[str, Tensor], model_file: ModelFile, folder: Path | str) -> None:
    """Write `folder`/model.safetensors and, last, `folder`/config.json: the arguments, and how images are prepared.

    Raises:
        ValueError: see `to_torchvision`.
    """
    config = _torchvision_vit(model_file.model)
    weights = to_torchvision(state, config)
    document = {
        "model": "torchvision.models.VisionTransformer",
        "arguments": torchvision_arguments(config),
        "preprocess": model_file.preprocess.model_dump(mode="json"),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n")


def _torchvision_vit(given: NetworkConfig) -> VitConfig:
    config = plain_vit(given, "torchvision", may_differ=("head",))
    if config.gelu != "exact":
        raise ValueError(
            "model.gelu is tanh, torchvision's is the exact one: its logits would be others. Train with model.gelu "
            "exact, or use the safetensors, timm or transformers format"
        )
    if config.in_channels != 3:
        raise ValueError(
            f"model.in_channels is {config.in_channels}: torchvision's Vision Transformer takes colour images. Use the "
            "safetensors format"
        )
    if config.image_size[0] != config.image_size[1]:
        raise ValueError(
            f"model.image_size is {list(config.image_size)}: torchvision's Vision Transformer takes square images. Use "
            "the safetensors format"
        )
    return config


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
