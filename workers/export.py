"""Export of a checkpoint's weights for other code, checked by reading the export back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from configs.layout import export_prefix
from configs.wire import Manifest, ModelFile
from vit.formats import read_weights, write_official
from vit.safetensors_file import read_safetensors
from vit.timm_format import from_timm, save_timm
from vit.weights import CONFIG_NAME, WEIGHTS_NAME, save
from workers.shards import CheckpointCorrupt
from workers.store import NotFound, ObjectStore

NPZ_NAME = "model.npz"
_CHUNK_BYTES = 64 * 1024 * 1024


def export_weights(
    store: ObjectStore, job_id: str, format_: str, state: Mapping[str, Tensor], manifest: Manifest, folder: Path
) -> None:
    """Write exports/<format>/model.safetensors (or .npz) and config.json, by way of `folder`, and read them back.

    Raises:
        ValueError: the format cannot express the model.
        CheckpointCorrupt: what came back from the store is not bit for bit what went in.
    """
    model_file = ModelFile(
        model=manifest.model,
        preprocess=manifest.preprocess,
        checkpoint_id=manifest.checkpoint_id,
        job_id=manifest.job_id,
        step=manifest.step,
        metrics=manifest.metrics,
    )
    write = {"timm": save_timm, "npz": write_official}.get(format_, save)
    write(state, model_file, folder)
    weights_name = NPZ_NAME if format_ == "npz" else WEIGHTS_NAME
    prefix = export_prefix(job_id, format_)
    for name in (weights_name, CONFIG_NAME):
        store.put_file(prefix + name, folder / name)
    _check_export(store, prefix, format_, state, manifest, folder / f"read-back{Path(weights_name).suffix}")


def _check_export(
    store: ObjectStore, prefix: str, format_: str, state: Mapping[str, Tensor], manifest: Manifest, path: Path
) -> None:
    key = prefix + (NPZ_NAME if format_ == "npz" else WEIGHTS_NAME)
    _download(store, key, path)
    found = read_weights(path, config=manifest.model).state if format_ == "npz" else read_safetensors(path)
    if format_ == "timm":
        found = from_timm(found, manifest.model)
    for name, tensor in state.items():
        if name not in found or not torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)):
            raise CheckpointCorrupt(key, f"weight {name!r} came back altered")


def _download(store: ObjectStore, key: str, path: Path) -> None:
    start = 0
    with path.open("wb") as file:
        try:
            while chunk := store.get_range(key, start, _CHUNK_BYTES):
                file.write(chunk)
                start += len(chunk)
        except NotFound as error:
            raise CheckpointCorrupt(key, "the object is missing") from error
