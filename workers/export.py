"""Export of a checkpoint's weights for other code, checked by reading the export back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from configs.layout import export_prefix
from configs.wire import Manifest, ModelFile
from vit.safetensors_file import read_safetensors
from vit.timm_format import from_timm, save_timm
from vit.weights import CONFIG_NAME, WEIGHTS_NAME, save
from workers.shards import CheckpointCorrupt
from workers.store import NotFound, ObjectStore

_CHUNK_BYTES = 64 * 1024 * 1024


def export_weights(
    store: ObjectStore, job_id: str, format_: str, state: Mapping[str, Tensor], manifest: Manifest, folder: Path
) -> None:
    """Write exports/<format>/model.safetensors and config.json, by way of `folder`, and read them back.

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
    (save_timm if format_ == "timm" else save)(state, model_file, folder)
    prefix = export_prefix(job_id, format_)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        store.put_file(prefix + name, folder / name)
    _check_export(store, prefix, format_, state, manifest, folder / "read-back.safetensors")


def _check_export(
    store: ObjectStore, prefix: str, format_: str, state: Mapping[str, Tensor], manifest: Manifest, path: Path
) -> None:
    key = prefix + WEIGHTS_NAME
    _download(store, key, path)
    found = read_safetensors(path)
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
