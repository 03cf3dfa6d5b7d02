"""Weight files of others: read into an ordinary state dict of ours, written for others.

read_weights    a file of any format below -> weights, configuration, which format it was
write_official  our weights -> an official .npz

format         file            names                                                    read   written
patchwork      .safetensors    ours                                                     yes    vit.weights.save
timm           .safetensors    timm `vit_*`, `resnetv2_*_bit`                           yes    vit.timm_format
transformers   .safetensors    Transformers ViT, versions 4 and 5                       yes    vit.transformers_format
torchvision    .safetensors    torchvision VisionTransformer                            yes    vit.torchvision_format
npz            .npz            google-research/vision_transformer, big_vision, BiT      yes    write_official
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from configs.cost import num_parameters
from configs.imports import ImportModel, WeightFormat, refused_by_name
from configs.model import BitConfig, NetworkConfig, VitConfig
from configs.wire import ModelFile
from vit.formats.bit import from_official_bit, is_official_bit, to_official_bit
from vit.formats.bit import has_head as has_bit_head
from vit.formats.bit import infer_config as infer_bit
from vit.formats.named import from_transformers, infer_config, infer_resnet, is_timm_resnet, is_transformers
from vit.formats.npz import NpzFile, write_npz
from vit.formats.official import find_layout, from_official, to_official
from vit.formats.official import infer_config as infer_official
from vit.safetensors_file import read_safetensors
from vit.state import check_weights
from vit.timm_format import from_timm, timm_names
from vit.torchvision_format import from_torchvision, is_torchvision

__all__ = ["Imported", "read_weights", "write_official"]

MAX_DEPTH = 256
MAX_PARAMETERS = 20_000_000_000


@dataclass(frozen=True)
class Imported:
    """Weights read from a file: complete, finite, fp32, on the CPU."""

    state: dict[str, Tensor]
    config: NetworkConfig
    format: WeightFormat


def read_weights(
    path: Path | str,
    wanted: ImportModel | None = None,
    config: NetworkConfig | None = None,
    format: WeightFormat | None = None,
    name: str | None = None,
) -> Imported:
    """The weights in a file, and the model they belong to.

    Args:
        wanted: what the tensors do not say.
        config: the whole configuration, where it is known (the config.json beside a file of ours).
        format: what the file must be; left out: whatever it is.
        name: the file's own name, where `path` is not it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of a kind that is not read, not what it should be, or does not say enough; names the tensor.
    """
    path, wanted = Path(path), wanted or ImportModel()
    reason = refused_by_name(name or path.name)
    if reason is not None:
        raise ValueError(reason)
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        found = _read_npz(path, wanted, config) if is_zip else _read_safetensors(path, wanted, config, format)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"the tensors describe no model: {where or 'sizes'}: {first['msg']}") from error
    if format is not None and found.format != format:
        raise ValueError(f"format {format}: the file is {found.format}")
    return found


def write_official(state: Mapping[str, Tensor], model_file: ModelFile, folder: Path) -> None:
    """Write `folder`/model.npz and, last, `folder`/config.json.

    Raises:
        ValueError: see `to_official`.
    """
    config = model_file.model
    arrays = to_official_bit(state, config) if isinstance(config, BitConfig) else to_official(state, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_npz(arrays, folder / "model.npz")
    (folder / "config.json").write_text(model_file.model_dump_json(indent=2) + "\n")


def _read_npz(path: Path, wanted: ImportModel, config: NetworkConfig | None) -> Imported:
    size = wanted.image_size
    image_size = (size, size) if isinstance(size, int) else size
    with NpzFile(path) as file:
        if is_official_bit(file.shapes):
            return _read_bit_npz(file, wanted, config or infer_bit(file.shapes, image_size))
        layout = find_layout(file.shapes)
        found = config or infer_official(file.shapes, layout, image_size)
        has_head = f"{layout.prefix}head/bias" in file.shapes
        found = _completed(found, wanted, has_head)
        if isinstance(found, BitConfig):
            raise ValueError("the file is a Vision Transformer, the configuration is a ResNet (resnet)")
        # A file with stacked layers has each array read once per layer.
        read = lru_cache(maxsize=3)(file.read)
        return Imported(from_official(read, file.shapes, layout, found, has_head), found, "npz")


def _read_bit_npz(file: NpzFile, wanted: ImportModel, config: NetworkConfig) -> Imported:
    if not isinstance(config, BitConfig):
        raise ValueError("the file is a BiT ResNet, the configuration is not (resnet is missing)")
    completed = _completed(config, wanted, has_bit_head(file.shapes))
    assert isinstance(completed, BitConfig)
    return Imported(from_official_bit(file.read, file.shapes, completed), completed, "npz")


def _read_safetensors(
    path: Path, wanted: ImportModel, config: NetworkConfig | None, format: WeightFormat | None
) -> Imported:
    state = timm_names(read_safetensors(path))
    if config is not None and format in (None, "patchwork"):
        _check_size(config)
        check_weights(state, config)
        return Imported({name: tensor.clone() for name, tensor in state.items()}, config, "patchwork")
    if is_timm_resnet(state):
        return _read_timm_resnet(state, wanted, config)
    theirs: WeightFormat = "timm"
    if is_transformers(state):
        state, theirs = from_transformers(state), "transformers"
    elif is_torchvision(state):
        state, theirs = from_torchvision(state), "torchvision"
    elif "pre_logits.weight" in state:
        theirs = "patchwork"
    has_head = "head.weight" in state
    config = _completed(config or infer_config(state, wanted, gelu="exact"), wanted, has_head)
    if isinstance(config, BitConfig):
        raise ValueError("the file is a Vision Transformer, the configuration is a ResNet (resnet)")
    if not has_head:
        state = state | {
            "head.weight": torch.zeros(config.num_classes, config.embed_dim),
            "head.bias": torch.zeros(config.num_classes),
        }
    if theirs == "patchwork":
        check_weights(state, config)
    else:
        if theirs in ("transformers", "torchvision") and config.head == "mlp":
            # ViTModel's pooler and torchvision's representation layer: a dense layer with tanh, our pre_logits.
            check_weights(state, config)
        else:
            state = from_timm(state, config)
    return Imported({name: tensor.contiguous().clone() for name, tensor in state.items()}, config, theirs)


def _read_timm_resnet(state: Mapping[str, Tensor], wanted: ImportModel, config: NetworkConfig | None) -> Imported:
    has_head = "head.fc.weight" in state
    config = _completed(config or infer_resnet(state, wanted), wanted, has_head)
    if not isinstance(config, BitConfig):
        raise ValueError("the file is a BiT ResNet, the configuration is not (resnet is missing)")
    if not has_head:
        zeros = torch.zeros(config.num_classes, config.resnet.num_features)
        state = {**state, "head.weight": zeros, "head.bias": zeros[:, 0].clone()}
    found = from_timm(state, config)
    return Imported({name: tensor.contiguous().clone() for name, tensor in found.items()}, config, "timm")


def _completed(config: NetworkConfig, wanted: ImportModel, has_head: bool) -> NetworkConfig:
    """The inferred configuration with what the user said, checked before anything of that size is made."""
    changes: dict[str, object] = {}
    if isinstance(config, BitConfig):
        for field in ("gelu", "num_heads"):
            if getattr(wanted, field) is not None:
                raise ValueError(f"model.{field} {getattr(wanted, field)}: the file is a ResNet, which has none")
    elif wanted.gelu is not None:
        changes["gelu"] = wanted.gelu
    if isinstance(config, VitConfig) and wanted.num_heads not in (None, config.num_heads):
        raise ValueError(f"model.num_heads {wanted.num_heads}: the file has {config.num_heads} heads")
    if not has_head:
        if wanted.num_classes is None:
            raise ValueError("the file has no classifier (head): give model.num_classes to add a zero one")
        changes["num_classes"] = wanted.num_classes
    elif wanted.num_classes is not None and wanted.num_classes != config.num_classes:
        raise ValueError(f"model.num_classes {wanted.num_classes}: the file has {config.num_classes} classes")
    completed = config.model_copy(update=changes)
    _check_size(completed)
    return completed


def _check_size(config: NetworkConfig) -> None:
    if isinstance(config, VitConfig):
        if not 1 <= config.depth <= MAX_DEPTH:
            raise ValueError(f"the model has {config.depth} blocks, 1 to {MAX_DEPTH} are read")
        if config.embed_dim % config.num_heads:
            raise ValueError(f"model.num_heads {config.num_heads} does not divide the width {config.embed_dim}")
    if num_parameters(config) > MAX_PARAMETERS:
        raise ValueError(f"the model has {num_parameters(config)} parameters, at most {MAX_PARAMETERS} are read")
