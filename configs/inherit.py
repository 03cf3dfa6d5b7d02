"""What a job takes over from the checkpoint it starts from, and where the two contradict one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from configs.data import DataConfig
from configs.errors import FieldError
from configs.model import (
    HYBRIDS,
    POOL_CHANGES,
    RESNETS,
    SIZE_FIELDS,
    VARIANTS,
    VIT_FIELDS,
    BitConfig,
    ModelConfig,
    NetworkConfig,
    stride_text,
    variant_sizes,
)
from configs.wire import DatasetCard, Preprocess


@dataclass(frozen=True)
class SourceCheckpoint:
    """The checkpoint a job starts from, as far as resolving needs to know it."""

    checkpoint_id: str
    prefix: str
    model: NetworkConfig
    preprocess: Preprocess
    data: DataConfig | None
    """What it was trained on, if known."""


_INHERITED = (
    "stem",
    "in_channels",
    "pool",
    "registers",
    "qk_norm",
    "gelu",
    "pos_embed",
    "pos_embed_at",
    "layer_scale",
)


def inherit(
    model: ModelConfig, source: SourceCheckpoint | None, keep_head: bool, faults: list[FieldError]
) -> dict[str, Any]:
    """What a fine-tune takes over from its checkpoint. What it gives itself must agree, except what may change."""
    if source is None:
        if not model.has_sizes:
            faults.append(FieldError("/model/variant", "model.variant is needed while the checkpoint is not known"))
            # A stand-in, so that the other faults can be found too.
            return {"variant": "B/16"}
        return {}
    origin = source.model
    inherited: dict[str, Any] = {}
    fields: tuple[str, ...] = (*SIZE_FIELDS, "resnet", *_INHERITED)
    fields = (*fields, "head") if keep_head else fields
    if isinstance(origin, BitConfig):
        # A Transformer's fields are as the job has them: ModelConfig has refused those that do not apply to a ResNet.
        fields = ("resnet", "in_channels")
        faults.extend(_vit_field_faults(model, source.checkpoint_id))
    for field in fields:
        given, theirs = getattr(model, field), getattr(origin, field, None)
        is_given = given is not None and (field in (*SIZE_FIELDS, "resnet") or field in model.model_fields_set)
        if field == "pool" and (theirs, given) in POOL_CHANGES and is_given:
            theirs = given
        if field == "layer_scale" and theirs is not None:
            is_given = False  # where the factors started changes nothing: they are the checkpoint's
        if is_given and given != theirs:
            faults.append(_contradiction(model, field, given, theirs, source.checkpoint_id))
        inherited[field] = theirs.model_dump() if isinstance(theirs, BaseModel) else theirs
    inherited["variant"] = _variant_of(origin)
    faults.extend(patch_faults("model.image_size", model.image_hw, origin))
    faults.extend(grid_faults("model.image_size", model.image_hw, origin))
    return inherited


def kept_head_faults(source: SourceCheckpoint, card: DatasetCard) -> list[FieldError]:
    """What stands against going on with the checkpoint's head: other classes."""
    if not source.model.has_classifier:
        message = (
            f"keep_head: checkpoint {source.checkpoint_id} was pre-trained with train.objective masked_patch and has "
            "no classifier to keep"
        )
        return [FieldError("/keep_head", message, True, "false, for a new head")]
    if source.model.num_classes == card.num_classes:
        return []
    message = (
        f"keep_head: checkpoint {source.checkpoint_id} tells {source.model.num_classes} classes apart, data set "
        f"{card.name} has {card.num_classes}"
    )
    return [FieldError("/keep_head", message, True, "false, for a new head")]


def _contradiction(model: ModelConfig, field: str, given: object, theirs: object, checkpoint_id: str) -> FieldError:
    if field in (*SIZE_FIELDS, "resnet") and model.variant is not None:
        message = f"model.variant {model.variant!r} has {field} {given}, checkpoint {checkpoint_id} has {theirs}"
        return FieldError("/model/variant", message, model.variant, f"{field} {theirs}")
    message = f"model.{field} {given!r} contradicts checkpoint {checkpoint_id}, whose {field} is {theirs!r}"
    return FieldError(f"/model/{field}", message, given, str(theirs))


def _vit_field_faults(model: ModelConfig, checkpoint_id: str) -> list[FieldError]:
    """What the job says of a Transformer while its checkpoint is a ResNet."""
    if model.embed_dim is not None:
        given = model.variant or model.embed_dim
        message = f"model.variant {given!r} is a Vision Transformer, checkpoint {checkpoint_id} is a ResNet"
        return [FieldError("/model/variant", message, given, "nothing, or the checkpoint's")]
    faults = []
    for field in VIT_FIELDS:
        given = getattr(model, field)
        if given != ModelConfig.model_fields[field].default:
            message = f"model.{field} {given!r} does not apply: checkpoint {checkpoint_id} is a ResNet"
            faults.append(FieldError(f"/model/{field}", message, given, "nothing"))
    return faults


def patch_faults(field: str, image_hw: tuple[int, int], origin: NetworkConfig) -> list[FieldError]:
    """Image sides that the checkpoint's patches do not divide; of `field`, as a path of dots."""
    if isinstance(origin, BitConfig):
        return []  # a ResNet takes any size
    return [
        FieldError(
            "/" + field.replace(".", "/"),
            f"{field} {side} is not a multiple of the checkpoint's {stride_text(origin)}",
            side,
            f"a multiple of {origin.stride}",
        )
        for side in sorted(set(image_hw))
        if side % origin.stride
    ]


def grid_faults(field: str, image_hw: tuple[int, int], origin: NetworkConfig) -> list[FieldError]:
    """Relative positions belong to one grid: the same 1-D offset is another displacement where rows are longer."""
    if isinstance(origin, BitConfig) or origin.pos_embed != "relative" or image_hw == origin.image_size:
        return []
    height, width = origin.image_size
    message = (
        f"{field} {image_hw[0]} x {image_hw[1]}: the checkpoint's pos_embed relative cannot be resized from "
        f"{height} x {width}"
    )
    return [FieldError("/" + field.replace(".", "/"), message, list(image_hw), f"{height} x {width}")]


def _variant_of(config: NetworkConfig) -> str | None:
    if isinstance(config, BitConfig):
        names = [f"{name}x{factor}" for name in RESNETS for factor in range(1, 5)]
        return next((name for name in names if variant_sizes(name)["resnet"] == config.resnet), None)
    own = {field: getattr(config, field) for field in (*SIZE_FIELDS, "stem")}
    names = [*HYBRIDS, *(f"{name}/{config.patch_size}" for name in VARIANTS)]
    return next((name for name in names if {"stem": None} | variant_sizes(name) == own), None)
