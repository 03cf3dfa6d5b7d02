"""Weights from one format into another: `vit.convert`, `patchwork convert`, and what export jobs write.

What is written is read back before it counts: the same tensors bit for bit, and the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from configs.imports import ImportModel, ImportPreprocess, WeightFormat
from configs.model import NetworkConfig, PosResize, VitConfig
from configs.spec import ExportFormat
from configs.wire import ModelFile, Preprocess
from vit.formats import read_weights, write_official
from vit.model import build
from vit.timm_format import save_timm
from vit.torchvision_format import save_torchvision
from vit.transfer import resize_weights
from vit.transformers_format import save_transformers
from vit.weights import CONFIG_NAME, WEIGHTS_NAME, read_model_file, save

NPZ_NAME = "model.npz"
_WRITERS: dict[ExportFormat, Callable[[Mapping[str, Tensor], ModelFile, Path], None]] = {
    "safetensors": save,
    "timm": save_timm,
    "transformers": save_transformers,
    "torchvision": save_torchvision,
    "npz": write_official,
}


class AlteredWeights(RuntimeError):
    """What was read back is not what was written."""


def weights_name(format: ExportFormat) -> str:
    """The name of the weights file of a format."""
    return NPZ_NAME if format == "npz" else WEIGHTS_NAME


def write_weights(state: Mapping[str, Tensor], model_file: ModelFile, format: ExportFormat, folder: Path) -> None:
    """Write a folder that other code opens: the weights, and a config.json, last.

    Raises:
        ValueError: the format cannot express the model; names the field.
    """
    if not model_file.model.has_classifier and format != "safetensors":
        raise ValueError(
            f"head masked_patch cannot be written as {format}, which knows classifiers only: fine-tune the checkpoint "
            "first, or take safetensors"
        )
    _WRITERS[format](state, model_file, folder)


def check_written(path: Path, state: Mapping[str, Tensor], config: NetworkConfig, format: ExportFormat) -> None:
    """Read a weights file of `format` back and compare it with `state`.

    Raises:
        AlteredWeights: a tensor or the logits differ.
    """
    theirs: WeightFormat = "patchwork" if format == "safetensors" else format
    found = read_weights(path, config=config, format=theirs).state
    for name, tensor in state.items():
        if name not in found or not torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)):
            raise AlteredWeights(f"weight {name!r} came back altered")
    images = torch.randn(2, config.in_channels, *config.image_size, generator=torch.Generator().manual_seed(0))
    if not torch.equal(_logits(state, config, images), _logits(found, config, images)):
        raise AlteredWeights("the weights came back as they were, their logits did not")


def convert(
    source: Path | str,
    out: Path | str,
    to: ExportFormat,
    *,
    model: ImportModel | None = None,
    preprocess: ImportPreprocess | None = None,
    image_size: int | None = None,
    pos_resize: PosResize = "official",
) -> ModelFile:
    """Read weights of any format, write them as another into the folder `out`, and check what was written.

    Args:
        source: a weights file, or a folder that `vit.load` opens.
        model: what the file does not say of its model.
        preprocess: how images are prepared, where no config.json of ours says so.
        image_size: pixels, if positions are to be resized, by the convention `pos_resize` (docs/models.md).

    Returns:
        What was written: the model and its preprocessing.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: `out` holds something already.
        ValueError: the file cannot be read, or the format cannot express the model; names the tensor or the field.
        AlteredWeights: what was read back differs.
    """
    source, out = Path(source), Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    path = source / WEIGHTS_NAME if source.is_dir() else source
    ours = _described(path)
    found = read_weights(path, model, None if ours is None else ours.model)
    state, config = found.state, found.config
    if ours is not None:
        prepared = ours.preprocess
    else:
        given = (preprocess or ImportPreprocess()).model_dump()
        prepared = Preprocess(image_size=config.image_size, in_channels=config.in_channels, **given)
    if image_size is not None:
        changed: dict[str, object] = {"image_size": (image_size, image_size)}
        if isinstance(config, VitConfig):
            changed["pos_resize"] = pos_resize
        target = config.model_copy(update=changed)
        state, config = resize_weights(state, config, target), target
        prepared = prepared.model_copy(update={"image_size": target.image_size})
    made = ModelFile(model=config, preprocess=prepared)
    write_weights(state, made, to, out)
    check_written(out / weights_name(to), state, config, to)
    return made


def _described(path: Path) -> ModelFile | None:
    """The config.json beside a file of ours; None where there is none, or it is another program's."""
    config = path.with_name(CONFIG_NAME)
    if path.suffix == ".npz" or not config.is_file():
        return None
    try:
        return read_model_file(config)
    except ValueError:
        return None


def _logits(state: Mapping[str, Tensor], config: NetworkConfig, images: Tensor) -> Tensor:
    model = build(config).eval()
    model.load_state_dict(dict(state))
    with torch.inference_mode():
        logits: Tensor = model(images)
    return logits
