"""Export of a checkpoint's weights for other code, checked by reading the export back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from configs.layout import export_prefix
from configs.spec import ExportFormat
from configs.wire import Manifest, ModelFile
from vit.convert import AlteredWeights, check_written, weights_name, write_weights
from workers.shards import CheckpointCorrupt
from workers.store import NotFound, ObjectStore

_CHUNK_BYTES = 64 * 1024 * 1024


def export_weights(
    store: ObjectStore,
    job_id: str,
    format_: ExportFormat,
    state: Mapping[str, Tensor],
    manifest: Manifest,
    folder: Path,
) -> None:
    """Write exports/<format>/model.safetensors (or .npz) and what goes with it, by way of `folder`, and read them back.

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
    write_weights(state, model_file, format_, folder)
    prefix = export_prefix(job_id, format_)
    for path in sorted(folder.iterdir()):
        store.put_file(prefix + path.name, path)
    key = prefix + weights_name(format_)
    read_back = folder / f"read-back{Path(key).suffix}"
    _download(store, key, read_back)
    try:
        check_written(read_back, state, manifest.model, format_)
    except (AlteredWeights, ValueError) as error:
        raise CheckpointCorrupt(key, str(error)) from error


def _download(store: ObjectStore, key: str, path: Path) -> None:
    start = 0
    with path.open("wb") as file:
        try:
            while chunk := store.get_range(key, start, _CHUNK_BYTES):
                file.write(chunk)
                start += len(chunk)
        except NotFound as error:
            raise CheckpointCorrupt(key, "the object is missing") from error
