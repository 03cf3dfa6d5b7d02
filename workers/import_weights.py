"""An import job's work: an uploaded weights file becomes an ordinary checkpoint, of step 0."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from configs.ids import checkpoint_id
from configs.imports import WeightOrigin
from configs.layout import checkpoint_prefix, manifest_key, upload_key
from configs.spec import ImportJob, UploadedFile
from configs.wire import AttemptFile, Manifest, Preprocess, TensorSlice
from vit.formats import Imported, read_weights
from workers.outcome import JobError
from workers.shards import ShardBuffer
from workers.store import NotFound, ObjectStore
from workers.versions import versions

_CHUNK_BYTES = 32 * 1024 * 1024
_SHARD = "shards/weights-00000-of-00001.safetensors"


def import_weights(
    attempt: AttemptFile, spec: ImportJob, store: ObjectStore, folder: Path, beat: Callable[[], None]
) -> str:
    """Make a checkpoint of the uploaded file, by way of `folder`. Returns its id.

    `beat` is called at every sign of life.

    Raises:
        JobError: the file is gone, is not the one that was announced, or cannot be read; says what is wrong where.
        AlreadyExists: another process of this attempt wrote the checkpoint.
    """
    path = folder / f"weights{Path(spec.file.name).suffix.lower()}"
    _download(store, spec.file, path, beat)
    try:
        found = read_weights(path, spec.model, spec.config, spec.format, name=spec.file.name)
    except ValueError as error:
        # The file is known to the user by its own name.
        raise JobError(f"{spec.file.name}: {str(error).replace(f'{path}: ', '').replace(str(path), 'it')}") from error
    beat()
    buffer = _shard(found.state)
    prefix = checkpoint_prefix(attempt.job_id, 0, attempt.number)
    store.put(prefix + buffer.name, buffer.data)
    beat()
    manifest = _manifest(attempt, spec, found, buffer)
    store.put(manifest_key(prefix), manifest.model_dump_json().encode(), if_none_match=True)
    return manifest.checkpoint_id


def _download(store: ObjectStore, file: UploadedFile, path: Path, beat: Callable[[], None]) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < file.num_bytes:
        raise OSError(f"{path.parent} has {free} bytes free, {file.name} needs {file.num_bytes}")
    key, start, digest = upload_key(file.upload), 0, hashlib.sha256()
    with path.open("wb") as out:
        while start < file.num_bytes:
            try:
                chunk = store.get_range(key, start, min(_CHUNK_BYTES, file.num_bytes - start))
            except NotFound as error:
                raise JobError(f"the uploaded file {file.name} is no longer in the store: import it again") from error
            if not chunk:
                raise JobError(f"the uploaded file {file.name} ends at byte {start} of {file.num_bytes}")
            digest.update(chunk)
            out.write(chunk)
            start += len(chunk)
            beat()
    if digest.hexdigest() != file.sha256:
        raise JobError(
            f"{file.name}: the uploaded bytes have SHA-256 {digest.hexdigest()}, {file.sha256} was announced: the file "
            "changed on the way; import it again"
        )


def _shard(state: dict[str, Tensor]) -> ShardBuffer:
    slices = tuple(
        TensorSlice(key=name, name=name, kind="weight", start=0, numel=tensor.numel()) for name, tensor in state.items()
    )
    buffer = ShardBuffer(_SHARD, 0, "weights", slices, pinned=False)
    for piece, slot in buffer.slots():
        slot.copy_(state[piece.name].reshape(-1))
    return buffer


def _manifest(attempt: AttemptFile, spec: ImportJob, found: Imported, buffer: ShardBuffer) -> Manifest:
    config, prepared = found.config, spec.preprocess
    names = prepared.class_names
    if names is not None and len(names) != config.num_classes:
        raise JobError(f"preprocess.class_names: {len(names)} names for {config.num_classes} classes")
    for field in ("mean", "std"):
        if len(getattr(prepared, field)) not in (1, config.in_channels):
            raise JobError(f"preprocess.{field} has {len(getattr(prepared, field))} values for {config.in_channels}")
    return Manifest(
        checkpoint_id=checkpoint_id(attempt.job_id, 0, attempt.number),
        job_id=attempt.job_id,
        attempt=attempt.number,
        step=0,
        position=0,
        total_steps=0,
        world_size=1,
        zero_stage=0,
        optimizer="none",
        optimizer_step=0,
        spec_hash=attempt.spec_hash,
        training_fingerprint=attempt.training_fingerprint,
        data_fingerprint="",
        versions=versions(),
        metrics={},
        model=config,
        preprocess=Preprocess(image_size=config.image_size, in_channels=config.in_channels, **prepared.model_dump()),
        origin=WeightOrigin(
            file=spec.file.name,
            num_bytes=spec.file.num_bytes,
            sha256=spec.file.sha256,
            format=found.format,
            source=spec.file.source,
        ),
        tensors={name: tuple(tensor.shape) for name, tensor in found.state.items()},
        files=(buffer.describe(),),
        nonce=uuid.uuid4().hex,
        created_at=datetime.now(UTC),
    )
