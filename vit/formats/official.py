"""The official .npz files: google-research/vision_transformer (ViT, AugReg, SAM, R50+ViT) and big_vision.

The two spell the same model differently. Where a weight of ours lies in a file is said once, as a list of rules, and
read in both directions.

    D  embed dim                 H  heads
    K  head dim, D / H           P  patch size
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from configs.model import StemConfig, VitConfig
from vit.state import check_weights, expected_shapes

Style = Literal["vision_transformer", "big_vision"]
Shape = tuple[int, ...]
_PREFIXES = ("", "opt/target/", "params/", "params/img/")
_BLOCK = "Transformer/encoderblock"
_QKV = ("query", "key", "value")
_MAP = "MAPHead_0"


@dataclass(frozen=True)
class Layout:
    """How a file spells its model."""

    prefix: str
    style: Style
    scanned: bool = False
    """big_vision: the blocks of all layers stacked on axis 0."""


@dataclass(frozen=True)
class _Rule:
    """Where one weight of ours lies, and how the arrays there become it."""

    ours: str
    theirs: tuple[str, ...]
    kind: Literal["same", "flat", "dense", "conv", "qkv", "qkv_bias", "out", "positions"]
    layer: int | None = None


# -- reading -----------------------------------------------------------------------------------------------------------
def find_layout(shapes: Mapping[str, Shape]) -> Layout:
    """How the file spells its model.

    Raises:
        ValueError: it is none of ours: no patch embedding where official files have it.
    """
    for prefix in _PREFIXES:
        if f"{prefix}embedding/kernel" in shapes:
            break
    else:
        raise ValueError(
            f"this is no official ViT file: there is no embedding/kernel in it (it starts with {_shown(shapes)})"
        )
    scanned = f"{prefix}{_BLOCK}/LayerNorm_0/scale" in shapes
    big_vision = prefix.startswith("params/") or f"{prefix}pos_embedding" in shapes or scanned
    return Layout(prefix, "big_vision" if big_vision else "vision_transformer", scanned)


def infer_config(shapes: Mapping[str, Shape], layout: Layout, image_size: tuple[int, int] | None) -> VitConfig:
    """The configuration of the model in the file, from its shapes alone; `num_classes` 1 where it has no head.

    Raises:
        ValueError: a shape that tells a size is missing or is not what it should be, or `image_size` is needed.
    """
    get = _getter(shapes, layout)
    kernel = get("embedding/kernel", 4)
    patch_size, embed_dim = kernel[0], kernel[3]
    attention = _attention(layout.style)
    if layout.scanned:
        depth = get(f"{_BLOCK}/LayerNorm_0/scale", 2)[0]
        query = get(f"{_BLOCK}/{attention}/query/kernel", 4)[1:]
        mlp_dim = get(f"{_BLOCK}/{_mlp(layout.style)}/Dense_0/bias", 2)[1]
    else:
        depth = _count(shapes, re.compile(re.escape(f"{layout.prefix}{_BLOCK}_") + r"(\d{1,4})/"))
        query = get(f"{_BLOCK}_0/{attention}/query/kernel", 3)
        mlp_dim = get(f"{_BLOCK}_0/{_mlp(layout.style)}/Dense_0/bias", 1)[0]
    is_map = f"{layout.prefix}{_MAP}/probe" in shapes
    stem = _infer_stem(shapes, layout)
    in_channels = get("conv_root/kernel", 4)[2] if stem is not None else kernel[2]
    is_cls = f"{layout.prefix}cls" in shapes
    positions = get(_positions(layout.style), 3)[1] - (1 if is_cls and layout.style == "vision_transformer" else 0)
    stride = patch_size * (stem.stride if stem is not None else 1)
    has_head = f"{layout.prefix}head/bias" in shapes
    return VitConfig.model_validate(
        {
            "patch_size": patch_size,
            "stem": stem,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": query[1],
            "mlp_dim": mlp_dim,
            "image_size": square_or(image_size, positions, stride),
            "in_channels": in_channels,
            "num_classes": get("head/bias", 1)[0] if has_head else 1,
            "head": "mlp" if f"{layout.prefix}pre_logits/kernel" in shapes else "linear",
            "pool": "map" if is_map else "cls" if is_cls else "gap",
            "gelu": "tanh",
        }
    )


def from_official(
    read: Callable[[str], Tensor], shapes: Mapping[str, Shape], layout: Layout, config: VitConfig, has_head: bool
) -> dict[str, Tensor]:
    """Our state dict. Every shape is checked before the first array is read; without a head, a zero one is put there.

    Raises:
        ValueError: arrays are missing, unexpected, of another shape or not finite; names them.
    """
    _refuse_ours_alone(config)
    ours = expected_shapes(config)
    rules = [rule for rule in _rules(config, layout.style) if has_head or not rule.ours.startswith("head.")]
    _check_shapes(rules, shapes, layout, config, ours)
    state = {rule.ours: _to_ours(rule, read, layout, config, ours[rule.ours]) for rule in rules}
    if not has_head:
        state |= {name: torch.zeros(ours[name]) for name in ("head.weight", "head.bias")}
    state = {name: state[name] for name in ours}
    check_weights(state, config)
    return state


# -- writing -----------------------------------------------------------------------------------------------------------
def to_official(state: Mapping[str, Tensor], config: VitConfig) -> dict[str, Tensor]:
    """The arrays of a google-research/vision_transformer file, with `pool: map` of a big_vision one; `from_official`
    gives `state` back, bit for bit.

    Raises:
        ValueError: the official code cannot express the model, or `state` is not a complete set of its weights.
    """
    if config.gelu != "tanh":
        raise ValueError("model.gelu exact: the official code computes GELU by tanh and would give other logits")
    if config.stem is not None and config.stem.numerics != "official":
        raise ValueError("model.stem.numerics timm: the official stems have other epsilons and give other logits")
    _refuse_ours_alone(config)
    check_weights(state, config)
    # Only big_vision has attention pooling.
    style: Style = "big_vision" if config.pool == "map" else "vision_transformer"
    prefix = "params/" if style == "big_vision" else ""
    arrays: dict[str, Tensor] = {}
    for rule in _rules(config, style):
        tensor = state[rule.ours].detach().to("cpu", torch.float32)
        names = [prefix + name for name in rule.theirs]
        arrays |= zip(names, _to_theirs(rule, tensor, config), strict=True)
    return arrays


def _refuse_ours_alone(config: VitConfig) -> None:
    if config.pool == "patch_mean":
        raise ValueError("model.pool patch_mean: the official code has no norm after pooling, only cls, gap and map")
    if config.registers:
        raise ValueError(f"model.registers {config.registers}: the official code has no register tokens, only 0")
    if config.qk_norm:
        raise ValueError("model.qk_norm true: the official code has no query-key norm, only false")
    if config.layer_scale is not None:
        raise ValueError(f"model.layer_scale {config.layer_scale:g}: the official code has no LayerScale, only null")
    if config.pos_embed not in ("learned", "sincos2d"):
        raise ValueError(
            f"model.pos_embed {config.pos_embed}: the official files have one position per token, only learned and "
            "sincos2d"
        )
    if config.pos_embed_at != "stem":
        raise ValueError(f"model.pos_embed_at {config.pos_embed_at}: the official code adds positions at the stem only")


# -- rules -------------------------------------------------------------------------------------------------------------
def _rules(config: VitConfig, style: Style) -> list[_Rule]:
    rules = [
        _Rule("patch_embed.proj.weight", ("embedding/kernel",), "conv"),
        _Rule("patch_embed.proj.bias", ("embedding/bias",), "same"),
        _Rule("pos_embed", (_positions(style),), "positions"),
        *_norm("norm", "Transformer/encoder_norm", None),
    ]
    if config.pool == "map":
        rules += _map_rules()
    if config.pool == "cls":
        rules.append(_Rule("cls_token", ("cls",), "same"))
    for name in ("pre_logits", "head") if config.head == "mlp" else ("head",):
        rules += _dense(name, name, None)
    for layer in range(config.depth):
        rules += _block_rules(layer, style)
    return rules + _stem_rules(config.stem)


def _block_rules(layer: int, style: Style) -> list[_Rule]:
    ours, theirs = f"blocks.{layer}", f"{_BLOCK}_{layer}"
    attention = f"{theirs}/{_attention(style)}"
    second = "LayerNorm_2" if style == "vision_transformer" else "LayerNorm_1"
    return [
        *_norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0", layer),
        _Rule(f"{ours}.attn.qkv.weight", tuple(f"{attention}/{part}/kernel" for part in _QKV), "qkv", layer),
        _Rule(f"{ours}.attn.qkv.bias", tuple(f"{attention}/{part}/bias" for part in _QKV), "qkv_bias", layer),
        _Rule(f"{ours}.attn.proj.weight", (f"{attention}/out/kernel",), "out", layer),
        _Rule(f"{ours}.attn.proj.bias", (f"{attention}/out/bias",), "same", layer),
        *_norm(f"{ours}.norm2", f"{theirs}/{second}", layer),
        *_dense(f"{ours}.mlp.fc1", f"{theirs}/{_mlp(style)}/Dense_0", layer),
        *_dense(f"{ours}.mlp.fc2", f"{theirs}/{_mlp(style)}/Dense_1", layer),
    ]


def _map_rules() -> list[_Rule]:
    """big_vision `models/vit.py`, `MAPHead`."""
    attention = f"{_MAP}/MultiHeadDotProductAttention_0"
    return [
        _Rule("attn_pool.latent", (f"{_MAP}/probe",), "same"),
        _Rule("attn_pool.q.weight", (f"{attention}/query/kernel",), "qkv"),
        _Rule("attn_pool.q.bias", (f"{attention}/query/bias",), "qkv_bias"),
        _Rule("attn_pool.kv.weight", tuple(f"{attention}/{part}/kernel" for part in _QKV[1:]), "qkv"),
        _Rule("attn_pool.kv.bias", tuple(f"{attention}/{part}/bias" for part in _QKV[1:]), "qkv_bias"),
        _Rule("attn_pool.proj.weight", (f"{attention}/out/kernel",), "out"),
        _Rule("attn_pool.proj.bias", (f"{attention}/out/bias",), "same"),
        *_norm("attn_pool.norm", f"{_MAP}/LayerNorm_0", None),
        *_dense("attn_pool.mlp.fc1", f"{_MAP}/MlpBlock_0/Dense_0", None),
        *_dense("attn_pool.mlp.fc2", f"{_MAP}/MlpBlock_0/Dense_1", None),
    ]


def _stem_rules(stem: StemConfig | None) -> list[_Rule]:
    """vit_jax `models_resnet.py`: blocks and units count from 1."""
    if stem is None:
        return []
    backbone = "patch_embed.backbone"
    rules = [
        _Rule(f"{backbone}.stem.conv.weight", ("conv_root/kernel",), "conv"),
        *_group_norm(f"{backbone}.stem.norm", "gn_root"),
    ]
    for stage, depth in enumerate(stem.layers):
        for unit in range(depth):
            ours, theirs = f"{backbone}.stages.{stage}.blocks.{unit}", f"block{stage + 1}/unit{unit + 1}"
            for number in (1, 2, 3):
                rules.append(_Rule(f"{ours}.conv{number}.weight", (f"{theirs}/conv{number}/kernel",), "conv"))
                rules += _group_norm(f"{ours}.norm{number}", f"{theirs}/gn{number}")
            if unit == 0:
                rules.append(_Rule(f"{ours}.downsample.conv.weight", (f"{theirs}/conv_proj/kernel",), "conv"))
                rules += _group_norm(f"{ours}.downsample.norm", f"{theirs}/gn_proj")
    return rules


def _norm(ours: str, theirs: str, layer: int | None) -> list[_Rule]:
    return [
        _Rule(f"{ours}.weight", (f"{theirs}/scale",), "same", layer),
        _Rule(f"{ours}.bias", (f"{theirs}/bias",), "same", layer),
    ]


def _group_norm(ours: str, theirs: str) -> list[_Rule]:
    """Official group norms have shape (1, 1, 1, C)."""
    return [_Rule(f"{ours}.weight", (f"{theirs}/scale",), "flat"), _Rule(f"{ours}.bias", (f"{theirs}/bias",), "flat")]


def _dense(ours: str, theirs: str, layer: int | None) -> list[_Rule]:
    return [
        _Rule(f"{ours}.weight", (f"{theirs}/kernel",), "dense", layer),
        _Rule(f"{ours}.bias", (f"{theirs}/bias",), "same", layer),
    ]


def _attention(style: Style) -> str:
    return "MultiHeadDotProductAttention_1" if style == "vision_transformer" else "MultiHeadDotProductAttention_0"


def _mlp(style: Style) -> str:
    return "MlpBlock_3" if style == "vision_transformer" else "MlpBlock_0"


def _positions(style: Style) -> str:
    return "Transformer/posembed_input/pos_embedding" if style == "vision_transformer" else "pos_embedding"


# -- arrays ------------------------------------------------------------------------------------------------------------
def _to_ours(rule: _Rule, read: Callable[[str], Tensor], layout: Layout, config: VitConfig, shape: Shape) -> Tensor:
    arrays = [read(_stored_name(name, rule.layer, layout)) for name in rule.theirs]
    if layout.scanned and rule.layer is not None:
        arrays = [array[rule.layer] for array in arrays]
    first, dim = arrays[0], config.embed_dim
    match rule.kind:
        case "conv":
            tensor = first.permute(3, 2, 0, 1)
        case "dense":
            tensor = first.T
        case "qkv":
            tensor = torch.cat([array.reshape(dim, dim).T for array in arrays])
        case "qkv_bias":
            tensor = torch.cat([array.reshape(dim) for array in arrays])
        case "out":
            tensor = first.reshape(dim, dim).T
        case "positions" if first.shape[1] + 1 == shape[1]:
            # big_vision adds positions before the class token comes in front: it has none, which is a zero one.
            tensor = torch.cat([torch.zeros(1, 1, dim), first], dim=1)
        case _:
            tensor = first.reshape(shape)
    return tensor.contiguous().clone()


def _to_theirs(rule: _Rule, tensor: Tensor, config: VitConfig) -> list[Tensor]:
    dim, heads = config.embed_dim, config.num_heads
    match rule.kind:
        case "conv":
            parts = [tensor.permute(2, 3, 1, 0)]
        case "dense":
            parts = [tensor.T]
        case "qkv":
            parts = [part.T.reshape(dim, heads, dim // heads) for part in tensor.chunk(len(rule.theirs))]
        case "qkv_bias":
            parts = [part.reshape(heads, dim // heads) for part in tensor.chunk(len(rule.theirs))]
        case "out":
            parts = [tensor.T.reshape(heads, dim // heads, dim)]
        case "flat":
            parts = [tensor.reshape(1, 1, 1, -1)]
        case _:
            parts = [tensor]
    return [part.contiguous() for part in parts]


def _check_shapes(
    rules: list[_Rule], shapes: Mapping[str, Shape], layout: Layout, config: VitConfig, ours: Mapping[str, Shape]
) -> None:
    wanted: dict[str, list[Shape]] = {}
    for rule in rules:
        stacked = (config.depth,) if layout.scanned and rule.layer is not None else ()
        allowed = [stacked + shape for shape in _their_shapes(rule, ours[rule.ours], config, layout)]
        wanted |= {_stored_name(name, rule.layer, layout): allowed for name in rule.theirs}
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise ValueError(f"weights are incomplete, missing: {_shown(missing)}")
    unexpected = [name for name in shapes if name.startswith(layout.prefix) and name not in wanted]
    if layout.prefix == "params/img/" or layout.prefix == "params/":
        unexpected = [name for name in unexpected if not name.startswith(("params/txt/", "params/t", "params/b"))]
    if unexpected:
        raise ValueError(f"arrays that do not belong to this model: {_shown(unexpected)}")
    for name, allowed in wanted.items():
        if shapes[name] not in allowed:
            raise ValueError(f"{name} has shape {shapes[name]}, expected {' or '.join(map(str, allowed))}")


def _their_shapes(rule: _Rule, shape: Shape, config: VitConfig, layout: Layout) -> list[Shape]:
    dim, heads = config.embed_dim, config.num_heads
    match rule.kind:
        case "conv":
            return [(shape[2], shape[3], shape[1], shape[0])]
        case "dense":
            return [(shape[1], shape[0])]
        case "qkv":
            return [(dim, heads, dim // heads)]
        case "qkv_bias":
            return [(heads, dim // heads)]
        case "out":
            return [(heads, dim // heads, dim)]
        case "flat":
            return [(1, 1, 1, *shape), shape]
        case "positions" if layout.style == "big_vision" and config.pool == "cls":
            return [(1, shape[1] - 1, dim)]
        case _:
            return [shape]


def _stored_name(name: str, layer: int | None, layout: Layout) -> str:
    if layout.scanned and layer is not None:
        name = name.replace(f"{_BLOCK}_{layer}/", f"{_BLOCK}/")
    return layout.prefix + name


# -- sizes -------------------------------------------------------------------------------------------------------------
def square_or(image_size: tuple[int, int] | None, positions: int, stride: int) -> tuple[int, int]:
    """The image size of a model with so many positions: the one given, else the square one.

    Raises:
        ValueError: it has another number of positions, or the positions form no square and none was given.
    """
    if image_size is not None:
        height, width = image_size
        if height % stride or width % stride or (height // stride) * (width // stride) != positions:
            raise ValueError(
                f"model.image_size {height} x {width} with patches of {stride} pixels does not give the {positions} "
                "positions of the file"
            )
        return image_size
    side = round(positions**0.5)
    if side * side != positions or positions < 1:
        raise ValueError(f"the file has {positions} positions, which are no square: give model.image_size")
    return side * stride, side * stride


def _infer_stem(shapes: Mapping[str, Shape], layout: Layout) -> StemConfig | None:
    root = shapes.get(f"{layout.prefix}conv_root/kernel")
    if root is None:
        return None
    stages = _count(shapes, re.compile(re.escape(layout.prefix) + r"block(\d{1,2})/"), first=1)
    layers = [
        _count(shapes, re.compile(re.escape(f"{layout.prefix}block{stage}/unit") + r"(\d{1,3})/"), first=1)
        for stage in range(1, stages + 1)
    ]
    return StemConfig.model_validate({"layers": layers, "width": root[-1], "numerics": "official"})


def _count(shapes: Mapping[str, Shape], pattern: re.Pattern[str], first: int = 0) -> int:
    numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    if numbers != set(range(first, first + len(numbers))):
        raise ValueError(f"parts of the model are missing: the file numbers {sorted(numbers)[:20]}, a gap")
    return len(numbers)


def _getter(shapes: Mapping[str, Shape], layout: Layout) -> Callable[[str, int], Shape]:
    def get(name: str, dims: int) -> Shape:
        shape = shapes.get(layout.prefix + name)
        if shape is None:
            raise ValueError(f"weights are incomplete, missing: {layout.prefix}{name}")
        if len(shape) != dims:
            raise ValueError(f"{layout.prefix}{name} has shape {shape}, expected {dims} dimensions")
        return shape

    return get


def _shown(names: object) -> str:
    listed = list(names)  # type: ignore[call-overload]
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more
