"""The official .npz files of BiT ResNets (`BiT-M-R50x1.npz`; google-research/big_vision `models/bit_paper.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from configs.model import BitConfig
from vit.state import check_weights, expected_shapes

Shape = tuple[int, ...]
_ROOT = "resnet/root_block/standardized_conv2d/kernel"
_NUMBERED = re.compile(r"standardized_conv2d_\d+")
DEFAULT_SIDE = 224
"""A file says nothing of its images' size, which a ResNet does not depend on."""


def is_official_bit(shapes: Mapping[str, Shape]) -> bool:
    """Whether these are the arrays of a BiT file."""
    return _ROOT in plain_names(shapes)


def plain_names(names: Mapping[str, object]) -> dict[str, str]:
    """The file's own name of each array, by its name without the numbers that some files give their convolutions."""
    return {_NUMBERED.sub("standardized_conv2d", name): name for name in names}


def infer_config(shapes: Mapping[str, Shape], image_size: tuple[int, int] | None) -> BitConfig:
    """The configuration of the model in the file, from its shapes alone; `num_classes` 1 where it has no head.

    Raises:
        ValueError: a shape that tells a size is missing or has other dimensions.
    """
    names = plain_names(shapes)
    root = shapes[names[_ROOT]]
    if len(root) != 4:
        raise ValueError(f"{names[_ROOT]} has shape {root}, expected 4 dimensions")
    units: dict[int, set[int]] = {}
    for name in names:
        if match := re.match(r"resnet/block(\d{1,2})/unit(\d{2,3})/", name):
            units.setdefault(int(match[1]), set()).add(int(match[2]))
    for number, stage in enumerate(sorted(units), start=1):
        if stage != number or units[stage] != set(range(1, len(units[stage]) + 1)):
            raise ValueError(f"parts of the model are missing: block{stage} has units {sorted(units[stage])[:20]}")
    head = shapes.get("resnet/head/conv2d/bias")
    return BitConfig.model_validate(
        {
            "resnet": {"layers": [len(units[stage]) for stage in sorted(units)], "width": root[3]},
            "image_size": image_size or (DEFAULT_SIDE, DEFAULT_SIDE),
            "in_channels": root[2],
            "num_classes": 1 if head is None or len(head) != 1 else head[0],
        }
    )


def has_head(shapes: Mapping[str, Shape]) -> bool:
    return "resnet/head/conv2d/bias" in shapes


def from_official_bit(
    read: Callable[[str], Tensor], shapes: Mapping[str, Shape], config: BitConfig
) -> dict[str, Tensor]:
    """Our state dict. Every shape is checked before the first array is read; without a head, a zero one is put there.

    Raises:
        ValueError: arrays are missing, unexpected, of another shape or not finite; names them.
    """
    ours, names = expected_shapes(config), plain_names(shapes)
    wanted = {name: official_name(name) for name in ours if has_head(shapes) or not name.startswith("head.")}
    missing = [theirs for theirs in wanted.values() if theirs not in names]
    if missing:
        raise ValueError(f"weights are incomplete, missing: {', '.join(missing[:5])}")
    unexpected = sorted(set(names) - set(wanted.values()))
    if unexpected:
        raise ValueError(f"arrays that do not belong to this model: {', '.join(unexpected[:5])}")
    for name, theirs in wanted.items():
        expected, found = _their_shape(name, ours[name]), shapes[names[theirs]]
        if found != expected and not (len(ours[name]) == 1 and found == (1, 1, 1, *ours[name])):
            raise ValueError(f"{names[theirs]} has shape {found}, expected {expected}")
    state = {name: torch.zeros(ours[name]) for name in ours if name not in wanted}
    for name, theirs in wanted.items():
        array = read(names[theirs])
        tensor = array.permute(3, 2, 0, 1) if array.ndim == 4 and len(ours[name]) > 1 else array
        state[name] = tensor.reshape(ours[name]).contiguous().clone()
    state = {name: state[name] for name in ours}
    check_weights(state, config)
    return state


def to_official_bit(state: Mapping[str, Tensor], config: BitConfig) -> dict[str, Tensor]:
    """The arrays of an official file; `from_official_bit` gives `state` back, bit for bit.

    Raises:
        ValueError: the official code would give other logits, or `state` is not a complete set of weights.
    """
    if config.resnet.numerics != "official":
        raise ValueError("model.resnet.numerics timm: the official ResNets have another epsilon and give other logits")
    check_weights(state, config)
    arrays = {}
    for name, tensor in state.items():
        array = tensor.detach().to("cpu", torch.float32)
        if name == "head.weight":
            array = array[:, :, None, None]
        arrays[official_name(name)] = (array.permute(2, 3, 1, 0) if array.ndim == 4 else array).contiguous()
    return arrays


def official_name(name: str) -> str:
    """Where a weight of ours lies in an official file."""
    if name.startswith("head."):
        return f"resnet/head/conv2d/{'kernel' if name.endswith('weight') else 'bias'}"
    if name == "stem.conv.weight":
        return _ROOT
    kind = "gamma" if name.endswith("weight") else "beta"
    if name.startswith("norm."):
        return f"resnet/group_norm/{kind}"
    match = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(conv|norm|downsample\.conv)(\d?)\.(?:weight|bias)", name)
    assert match is not None, name
    stage, unit, part, number = match.groups()
    folder = f"resnet/block{int(stage) + 1}/unit{int(unit) + 1:02d}"
    if part == "downsample.conv":
        return f"{folder}/a/proj/standardized_conv2d/kernel"
    letter = "abc"[int(number) - 1]
    return f"{folder}/{letter}/standardized_conv2d/kernel" if part == "conv" else f"{folder}/{letter}/group_norm/{kind}"


def _their_shape(name: str, shape: Shape) -> Shape:
    if name == "head.weight":
        return (1, 1, shape[1], shape[0])
    return (shape[2], shape[3], shape[1], shape[0]) if len(shape) == 4 else shape
