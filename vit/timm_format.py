"""Weights for timm and from timm (`timm.models.vision_transformer.VisionTransformer`).

Our parameter names are timm's, so a model both can express has the same weights; what this file adds is knowing which
those are. An exported folder opens with `timm.create_model("local-dir:<folder>", pretrained=True)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.model import RESNET_WIDTH, BitConfig, NetworkConfig, VitConfig
from configs.wire import ModelFile
from vit.safetensors_file import write_safetensors
from vit.state import check_weights, expected_shapes

_FOREIGN_PARTS = {
    "norm_pre.": "a norm before the blocks (pre_norm)",
    "head_dist.": "a distillation head",
}
_ATTENTION_POOL = {"attn_pool.": "attention pooling"}
_REGISTERS = {"reg_token": "register tokens"}
_QK_NORM = {"q_norm.": "query-key norm", "k_norm.": "query-key norm"}
_LAYER_SCALE = {"ls1.": "LayerScale", "ls2.": "LayerScale"}
_POOLED_NORM = {"fc_norm.": "a norm after pooling (fc_norm)"}
_DEIT_GAMMA = re.compile(r"^(blocks\.\d+)\.gamma_([12])$")


def to_timm(state: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """timm's state dict of the model made with `timm_arguments(config)`: equal logits.

    Raises:
        ValueError: the model has an MLP head, positions or a stem that timm has not, or `state` is not a complete set
            of weights.
    """
    if isinstance(config, BitConfig):
        _timm_resnet(config)
        check_weights(state, config)
        return {_RESNET_HEAD.get(name, name): _to_conv(name, tensor) for name, tensor in state.items()}
    _refuse_ours_alone(config)
    _timm_architecture(config)
    check_weights(state, config)
    return {_theirs(name, config): tensor for name, tensor in state.items()}


def from_timm(state: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """Our state dict of a timm state dict; LayerScale may have DeiT-III's names. A class token or register
    without a position of its own (`no_embed_class`) gets a zero one, which is the same function.

    Raises:
        ValueError: timm's model has parts ours has not, or its weights are not those of `config`.
    """
    if isinstance(config, BitConfig):
        return _resnet_from_timm(state, config)
    _refuse_ours_alone(config)
    state = timm_names(state)
    foreign = _foreign_parts(config)
    for name in state:
        for part, meaning in foreign.items():
            if name.startswith(part) or f".{part}" in name:
                raise ValueError(f"timm's model has {meaning} ({name}), which this model has not")
    names = {_theirs(name, config): name for name in expected_shapes(config)}
    ours = {names.get(name, name): tensor for name, tensor in state.items()}
    rows, columns = config.grid
    positions = ours.get("pos_embed")
    if config.num_prefix and positions is not None and positions.shape[1] == rows * columns:
        zeros = positions.new_zeros(1, config.num_prefix, positions.shape[2])
        ours["pos_embed"] = torch.cat([zeros, positions], dim=1)
    check_weights(ours, config)
    return ours


def _foreign_parts(config: VitConfig) -> dict[str, str]:
    """What a file may hold that this model has not: beginnings of names, and what they are."""
    has_part: list[tuple[bool, dict[str, str]]] = [
        (config.layer_scale is not None, _LAYER_SCALE),
        (config.pool == "patch_mean", _POOLED_NORM),
        (config.pool == "map", _ATTENTION_POOL),
        (config.registers > 0, _REGISTERS),
        (config.qk_norm, _QK_NORM),
    ]
    foreign = dict(_FOREIGN_PARTS)
    for has, part in has_part:
        foreign |= {} if has else part
    return foreign


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, with timm's names for LayerScale where facebookresearch/deit has its own (`gamma_1`)."""
    return {_DEIT_GAMMA.sub(r"\1.ls\2.gamma", name): tensor for name, tensor in state.items()}


def timm_arguments(config: NetworkConfig) -> dict[str, Any]:
    """Keyword arguments of `timm.models.vision_transformer.VisionTransformer`, or of a ResNet's entry point, for the
    same function; all JSON."""
    if isinstance(config, BitConfig):
        return {"in_chans": config.in_channels, "num_classes": config.num_classes}
    return {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "num_classes": config.num_classes,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": _mlp_ratio(config),
        "global_pool": {"cls": "token", "map": "map"}.get(config.pool, "avg"),
        "class_token": config.has_cls_token,
        "fc_norm": config.pool == "patch_mean",
        "reg_tokens": config.registers,
        "qk_norm": config.qk_norm,
        "init_values": config.layer_scale,
        "pos_embed": "none" if config.pos_embed == "none" else "learn",
        "act_layer": "gelu_tanh" if config.gelu == "tanh" else "gelu",
    }


def timm_config(model_file: ModelFile) -> dict[str, Any]:
    """The config.json that timm reads beside the weights."""
    config, preprocess = model_file.model, model_file.preprocess
    channels, is_resnet = config.in_channels, isinstance(config, BitConfig)
    pretrained = {
        "input_size": [channels, *config.image_size],
        "fixed_input_size": not is_resnet,
        "interpolation": preprocess.interpolation,
        "crop_pct": 1.0 if preprocess.crop == "resize" else 0.875,
        "crop_mode": "squash" if preprocess.crop == "resize" else "center",
        "mean": list(preprocess.mean) * (channels // len(preprocess.mean)),
        "std": list(preprocess.std) * (channels // len(preprocess.std)),
        "num_classes": config.num_classes,
        "pool_size": None,
        "first_conv": _first_conv(config),
        "classifier": "head.fc" if is_resnet else "head",
    }
    if preprocess.class_names is not None:
        pretrained["label_names"] = list(preprocess.class_names)
    return {
        # Of a Transformer a starting point: model_args sets every size.
        "architecture": _timm_resnet(config) if isinstance(config, BitConfig) else _timm_architecture(config),
        "num_classes": config.num_classes,
        "num_features": config.resnet.num_features if isinstance(config, BitConfig) else config.embed_dim,
        "model_args": timm_arguments(config),
        "pretrained_cfg": pretrained,
    }


def save_timm(state: Mapping[str, Tensor], model_file: ModelFile, folder: Path | str) -> None:
    """Write `folder`/model.safetensors and, last, `folder`/config.json for timm.

    Raises:
        ValueError: see `to_timm`.
    """
    weights = to_timm(state, model_file.model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(timm_config(model_file), indent=2) + "\n")


_HYBRIDS = {
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (): "vit_tiny_r_s16_p8_224",
}


def _timm_architecture(config: VitConfig) -> str:
    """timm's entry point with the model's stem."""
    if config.stem is None:
        return "vit_base_patch16_224"
    if config.stem.layers not in _HYBRIDS or config.stem.width != 64:
        raise ValueError(
            f"timm has no hybrid whose stem has layers {list(config.stem.layers)} and width {config.stem.width}: only "
            f"layers {', '.join(str(list(layers)) for layers in _HYBRIDS)} at width 64. Use the safetensors format"
        )
    if config.stem.numerics != "timm":
        raise ValueError(
            "timm's stems have other epsilons than the official ones this model was trained with, and would give other "
            "logits: train with model.stem.numerics timm, or use the safetensors format"
        )
    return _HYBRIDS[config.stem.layers]


_RESNETS: dict[tuple[tuple[int, ...], int], str] = {
    ((3, 4, 6, 3), 1): "resnetv2_50x1_bit",
    ((3, 4, 6, 3), 3): "resnetv2_50x3_bit",
    ((3, 4, 23, 3), 1): "resnetv2_101x1_bit",
    ((3, 4, 23, 3), 3): "resnetv2_101x3_bit",
    ((3, 8, 36, 3), 2): "resnetv2_152x2_bit",
    ((3, 8, 36, 3), 4): "resnetv2_152x4_bit",
}
_RESNET_HEAD = {"head.weight": "head.fc.weight", "head.bias": "head.fc.bias"}


def _timm_resnet(config: BitConfig) -> str:
    """timm's entry point of a BiT ResNet."""
    resnet = config.resnet
    factor, rest = divmod(resnet.width, RESNET_WIDTH)
    if rest or (resnet.layers, factor) not in _RESNETS:
        known = ", ".join(name.removeprefix("resnetv2_").removesuffix("_bit") for name in _RESNETS.values())
        raise ValueError(
            f"model.resnet: timm has no BiT ResNet with layers {list(resnet.layers)} and width {resnet.width}, only "
            f"R{known.replace(', ', ', R')}. Use the safetensors or npz format"
        )
    if resnet.numerics != "timm":
        raise ValueError(
            "model.resnet.numerics official: timm's epsilon of the standardised weights is another: train with "
            "model.resnet.numerics timm, or use the safetensors or npz format"
        )
    return _RESNETS[resnet.layers, factor]


def _to_conv(name: str, tensor: Tensor) -> Tensor:
    """timm's classifier of a ResNet is a 1 x 1 convolution."""
    return tensor[:, :, None, None] if name == "head.weight" else tensor


def _resnet_from_timm(state: Mapping[str, Tensor], config: BitConfig) -> dict[str, Tensor]:
    ours = {theirs: name for name, theirs in _RESNET_HEAD.items()}
    renamed = {ours.get(name, name): tensor for name, tensor in state.items()}
    head = renamed.get("head.weight")
    if head is not None and head.ndim == 4:
        renamed["head.weight"] = head.flatten(1)
    check_weights(renamed, config)
    return renamed


def _first_conv(config: NetworkConfig) -> str:
    if isinstance(config, BitConfig):
        return "stem.conv"
    return "patch_embed.proj" if config.stem is None else "patch_embed.backbone.stem.conv"


def _theirs(name: str, config: VitConfig) -> str:
    """timm's name of a weight: a stem without stages lies one level higher there."""
    if config.stem is not None and not config.stem.layers:
        return name.replace("patch_embed.backbone.stem.", "patch_embed.backbone.")
    return name


def _refuse_ours_alone(config: VitConfig) -> None:
    if config.pos_embed in ("learned_2d", "relative"):
        raise ValueError(
            f"model.pos_embed {config.pos_embed}: timm's models have one position per token or none. Use the "
            "safetensors format"
        )
    if config.pos_embed_at != "stem":
        raise ValueError(
            f"model.pos_embed_at {config.pos_embed_at}: timm's models add positions at the stem only. Use the "
            "safetensors format"
        )
    if config.head == "mlp":
        raise ValueError(
            "head: mlp has a hidden layer (pre_logits) before the classifier, which timm's models have not: the "
            "classifier would give other logits. Fine-tune with head: linear, or use the safetensors format"
        )


def _mlp_ratio(config: VitConfig) -> float:
    """timm computes int(embed_dim * ratio): where the quotient would round below mlp_dim, aim between two integers."""
    ratio = config.mlp_dim / config.embed_dim
    return ratio if int(config.embed_dim * ratio) == config.mlp_dim else (config.mlp_dim + 0.5) / config.embed_dim
