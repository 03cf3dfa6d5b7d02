"""Weights for Transformers (`ViTForImageClassification`), with the names that its versions 4 and 5 both save and load.

A folder opens with `ViTForImageClassification.from_pretrained(folder)`, its preprocessing with
`AutoImageProcessor.from_pretrained(folder)`. Reading is in `vit.formats`: of either version's names.
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
from vit.blocks import LAYER_NORM_EPS
from vit.safetensors_file import write_safetensors
from vit.state import check_weights

_BILINEAR, _BICUBIC = 2, 3
"""Pillow's numbers of the filters, which Transformers' preprocessor files hold."""
_RENAMED = (
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def to_transformers(state: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """Transformers' state dict of the model made with `transformers_arguments(config)`: equal logits.

    Raises:
        ValueError: Transformers' ViT has not all parts of the model, or `state` is not a complete set of weights.
    """
    plain_vit(config, "Transformers")
    check_weights(state, config)
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs[_renamed(name.replace(".attn.qkv.", f".attention.attention.{part}."))] = piece.contiguous()
        else:
            theirs[_renamed(name)] = tensor
    return theirs


def transformers_arguments(config: VitConfig) -> dict[str, Any]:
    """Keyword arguments of `transformers.ViTConfig` for the same function."""
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu_pytorch_tanh" if config.gelu == "tanh" else "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": config.image_size[0] if _is_square(config) else list(config.image_size),
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "qkv_bias": True,
    }


def save_transformers(state: Mapping[str, Tensor], model_file: ModelFile, folder: Path | str) -> None:
    """Write `folder`/model.safetensors, preprocessor_config.json and, last, config.json.

    Raises:
        ValueError: see `to_transformers`.
    """
    config = plain_vit(model_file.model, "Transformers")
    weights = to_transformers(state, config)
    names = model_file.preprocess.class_names or tuple(f"LABEL_{i}" for i in range(config.num_classes))
    document = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        **transformers_arguments(config),
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(model_file), indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n")


def plain_vit(config: NetworkConfig, whose: str, may_differ: tuple[str, ...] = ()) -> VitConfig:
    """The configuration, if it is that of a plain ViT with a class token and a linear head.

    Raises:
        ValueError: it has more, but for the fields that `may_differ`; names the field.
    """
    if not isinstance(config, VitConfig):
        raise ValueError(f"model.resnet: {whose} has no BiT ResNets. Use the safetensors, timm or npz format")
    plain = VitConfig.model_fields
    for field in ("stem", "pool", "registers", "qk_norm", "layer_scale", "pos_embed_at", "head"):
        value = getattr(config, field)
        if field not in may_differ and value != plain[field].default:
            shown = value if isinstance(value, str | int | float) else "set"
            raise ValueError(
                f"model.{field} is {shown}, which {whose}'s Vision Transformer has not: its logits would be others. "
                "Use the safetensors format"
            )
    if config.pos_embed not in ("learned", "sincos2d"):
        raise ValueError(
            f"model.pos_embed is {config.pos_embed}: {whose}'s Vision Transformer has one position per token. Use the "
            "safetensors format"
        )
    return config


def _preprocessor(model_file: ModelFile) -> dict[str, Any]:
    preprocess, channels = model_file.preprocess, model_file.preprocess.in_channels
    height, width = preprocess.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC if preprocess.interpolation == "bicubic" else _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean) * (channels // len(preprocess.mean)),
        "image_std": list(preprocess.std) * (channels // len(preprocess.std)),
        "do_convert_rgb": channels == 3,
    }


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _is_square(config: VitConfig) -> bool:
    return config.image_size[0] == config.image_size[1]
