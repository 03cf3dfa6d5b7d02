"""Model files: a folder that `vit.load` opens in one line.

<folder>/
    model.safetensors    every parameter, fp32, under its name in `vit.model`
    config.json          ModelFile: the model, the preprocessing, where it came from
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from configs.model import without_tags
from configs.wire import ModelFile
from vit.model import Network, empty
from vit.safetensors_file import read_safetensors, write_safetensors
from vit.state import check_weights
from vit.timm_format import from_timm, to_timm

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 16 * 1024 * 1024
"""Room for the names of a hundred thousand classes."""

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "from_timm", "load", "read_model_file", "read_safetensors", "save", "to_timm"]


def save(state: Mapping[str, Tensor], model_file: ModelFile, folder: Path | str) -> None:
    """Write `folder`/model.safetensors and, last, `folder`/config.json.

    Raises:
        ValueError: `state` is not a complete, finite set of weights for `model_file.model`.
    """
    check_weights(state, model_file.model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(state, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(model_file.model_dump_json(indent=2) + "\n")


def load(path: Path | str) -> Network:
    """The model of a folder (or of a .safetensors file with its config.json beside it): on the CPU, fp32, in eval
    mode, with `.config` and `.preprocess` set.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be, or the weights are not those of the configuration; names the
            weight and both shapes.
    """
    path = Path(path)
    weights_path = path / WEIGHTS_NAME if path.is_dir() else path
    model_file = read_model_file(weights_path.with_name(CONFIG_NAME))
    state = read_safetensors(weights_path)
    check_weights(state, model_file.model)
    model = empty(model_file.model).to_empty(device="cpu")
    model.load_state_dict(state)  # copies, so that the model does not depend on the file
    model.preprocess = model_file.preprocess
    return model.eval()


def read_model_file(path: Path) -> ModelFile:
    """The parsed config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a ModelFile, or contradicts itself.
    """
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {size} bytes, at most {MAX_CONFIG_BYTES} are read")
    try:
        model_file = ModelFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in without_tags(first["loc"]))
        raise ValueError(f"{path} does not describe a model of ours: {where or 'file'}: {first['msg']}") from error
    model, preprocess = model_file.model, model_file.preprocess
    if (preprocess.image_size, preprocess.in_channels) != (model.image_size, model.in_channels):
        raise ValueError(
            f"{path}: images are prepared as {preprocess.in_channels} x {preprocess.image_size}, "
            f"the model takes {model.in_channels} x {model.image_size}"
        )
    return model_file
