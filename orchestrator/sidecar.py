"""What the JSON files beside a weights file say of its model: ours, timm's, Transformers'. Read on the user's side,
where the files are; only the weights travel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.wire import ModelFile
from orchestrator.connection import PatchworkError

MAX_BYTES = 16 * 1024 * 1024
_GELUS = {
    "gelu": "exact",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
    "gelu_tanh": "tanh",
}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


class SidecarError(PatchworkError):
    """A description beside the weights cannot be used."""


def describe(weights: Path) -> tuple[dict[str, Any], list[str]]:
    """Fields of `schemas.ImportCreate` that the files beside `weights` give, and a sentence for each file used.

    Raises:
        SidecarError: a config.json is there and is damaged, or asks for what this model has not.
    """
    document = _read(weights.with_name("config.json"))
    if document is None:
        return {}, []
    if "architecture" in document or "pretrained_cfg" in document:
        return _timm(document), ["config.json beside it describes a timm model: preprocessing taken from there"]
    if "num_hidden_layers" in document:
        processor = _read(weights.with_name("preprocessor_config.json"))
        return _transformers(document, processor), ["config.json beside it describes a Transformers model"]
    if isinstance(document.get("model"), dict) and "preprocess" in document:
        return _ours(weights.with_name("config.json"), document), ["config.json beside it describes a model of ours"]
    return {}, []


def _ours(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    try:
        found = ModelFile.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise SidecarError(f"{path} does not describe a model of ours: {error.errors()[0]['msg']}") from error
    preprocess = found.preprocess.model_dump(mode="json", exclude={"image_size", "in_channels"})
    return {"config": found.model.model_dump(mode="json"), "preprocess": preprocess, "format": None}


def _timm(document: dict[str, Any]) -> dict[str, Any]:
    pretrained = document.get("pretrained_cfg") or document
    arguments = document.get("model_args") or {}
    model: dict[str, Any] = {}
    if isinstance(arguments.get("num_heads"), int):
        model["num_heads"] = arguments["num_heads"]
    if arguments.get("act_layer") in _GELUS:
        model["gelu"] = _GELUS[arguments["act_layer"]]
    if isinstance(arguments.get("img_size"), list):
        model["image_size"] = arguments["img_size"]
    # timm crops with antialiasing; crop_pct of its models is near 7/8 unless they squash.
    squash = pretrained.get("crop_mode") == "squash" or pretrained.get("crop_pct") == 1.0
    preprocess = _preprocess(pretrained.get("mean"), pretrained.get("std"), pretrained.get("interpolation"))
    preprocess |= {"crop": "resize" if squash else "center"}
    if isinstance(pretrained.get("label_names"), list):
        preprocess["class_names"] = pretrained["label_names"]
    return {"model": model, "preprocess": preprocess}


def _transformers(document: dict[str, Any], processor: dict[str, Any] | None) -> dict[str, Any]:
    act = document.get("hidden_act", "gelu")
    if act not in _GELUS:
        raise SidecarError(f"config.json: hidden_act {act!r} is not GELU, which is what this model has")
    model = {"num_heads": document.get("num_attention_heads"), "gelu": _GELUS[act]}
    given = processor or {}
    interpolation = _RESAMPLE.get(given.get("resample", 2))
    preprocess = _preprocess(given.get("image_mean"), given.get("image_std"), interpolation)
    labels = document.get("id2label")
    if isinstance(labels, dict) and labels and not all(str(name).startswith("LABEL_") for name in labels.values()):
        preprocess["class_names"] = [labels[str(index)] for index in range(len(labels)) if str(index) in labels]
    return {"model": model, "preprocess": preprocess | {"antialias": True}}


def _preprocess(mean: object, std: object, interpolation: object) -> dict[str, Any]:
    given = {"mean": mean, "std": std, "interpolation": interpolation}
    return {field: value for field, value in given.items() if value is not None and value != "random"}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise SidecarError(f"{path} has {path.stat().st_size} bytes, at most {MAX_BYTES} are read")
    try:
        document = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SidecarError(f"{path} is not JSON: {error}") from error
    return document if isinstance(document, dict) else None
