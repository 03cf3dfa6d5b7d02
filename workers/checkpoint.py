"""Checkpoints: staged in the step, uploaded behind it, committed by a manifest that is written last.

    checkpoints/step-000000100-a0001/
        shards/weights-00000-of-00002.safetensors     what rank 0 owns of the weights: 1-D fp32 runs (workers/shards.py)
        shards/optimizer-00000-of-00002.safetensors   the same runs of the optimizer's moments
        shards/ema-00000-of-00002.safetensors         the same runs of the weights' moving average, if there is one
        shards/rank-00000-of-00002.json               names, sizes and checksums of these, written after them
        …                                             the same for every rank
        manifest.json                                 rank 0, when all ranks have uploaded, If-None-Match: *

A checkpoint exists when its manifest does. One save, in order:

1. Every rank copies what it owns into a buffer that was allocated once. The step waits for this only.
2. A background thread computes checksums and uploads, trying again while the store is away. One save at a time is under
   way: one that falls due meanwhile waits for it a few seconds, so that a cadence is kept where it can be, and if that
   is not enough training goes on and the save is taken at the first step boundary after.
3. The control word tells every rank, at the same step, that all have uploaded. Rank 0 then writes the manifest.

A process that dies before 3 leaves objects that nothing names; the previous checkpoint stands.
"""

from __future__ import annotations

import concurrent.futures
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar
from uuid import uuid4

import torch
from pydantic import ValidationError
from torch import Tensor

from configs.failpoints import failpoint
from configs.ids import checkpoint_id
from configs.layout import checkpoint_prefix, manifest_key, rank_files_key
from configs.lineage import batch_number
from configs.model import NetworkConfig
from configs.reasons import ExitReason
from configs.states import Desired
from configs.train import Weights
from configs.wire import DataSkip, LossWatch, Manifest, ParentCut, Preprocess, RankFiles, ShardFile, TensorSlice
from workers.control import ControlWord, Word
from workers.distributed import Ranks
from workers.ema import WeightAverage
from workers.owned import HasDeepSpeed, Owned, begin_load, finish_load, moment, moment_names, owned, shapes
from workers.report import Reporter
from workers.shards import CheckpointCorrupt, ShardBuffer, Wanted, read_into
from workers.store import AlreadyExists, NotFound, ObjectStore, StorageError, StoreRefused
from workers.versions import versions

UPLOAD_DEADLINE_S = 480.0
"""How long an upload is tried again while the store does not answer; training goes on meanwhile. At the end of an
attempt all ranks wait, so it is shorter than what the driver takes for a hung save."""
PATIENCE_S = 10.0
"""How long a save that falls due waits for the one before it."""
_BEAT_S = 1.0
_WEIGHT = "weight"
_EMA = "ema"
_T = TypeVar("_T")


class CheckpointMismatch(ValueError):
    """The checkpoint is sound but belongs to other training."""


@dataclass(frozen=True)
class Progress:
    """Where training stands; together with weights and moments, all there is to resume from."""

    step: int = 0
    """Global batches consumed."""
    skipped_steps: int = 0
    """Of these, how many changed nothing because their gradient was not finite."""
    nonfinite_steps: int = 0
    """How many in a row were skipped up to here."""
    is_measured: bool = False
    """Whether the checkpoint that was resumed from holds an evaluation of this step."""
    skips: tuple[DataSkip, ...] = ()
    """Data that rollbacks passed over."""
    loss_watch: LossWatch = field(default_factory=LossWatch)


@dataclass(frozen=True)
class CheckpointFacts:
    """What every manifest of an attempt says alike."""

    job_id: str
    attempt: int
    parent: ParentCut | None
    total_steps: int
    global_batch_size: int
    optimizer: str
    spec_hash: str
    training_fingerprint: str
    data_fingerprint: str
    model: NetworkConfig
    preprocess: Preprocess


@dataclass(frozen=True)
class _Save:
    """A checkpoint under way."""

    number: int
    """Counted from 1 in this attempt."""
    progress: Progress
    metrics: dict[str, float]
    prefix: str


class Checkpointer:
    """Saves at a cadence of steps. Every rank has one, and all make the same calls at the same steps."""

    def __init__(
        self,
        store: ObjectStore,
        engine: HasDeepSpeed,
        ranks: Ranks,
        facts: CheckpointFacts,
        reporter: Reporter,
        every_steps: int | None,
        upload_deadline_s: float = UPLOAD_DEADLINE_S,
        patience_s: float = PATIENCE_S,
        average: WeightAverage | None = None,
    ) -> None:
        self._store = store
        self._engine = engine
        self._ranks = ranks
        self._facts = facts
        self._reporter = reporter
        self._every_steps = every_steps
        self._upload_deadline_s = upload_deadline_s
        self._patience_s = patience_s
        self._buffers = _buffers(engine, ranks, average)
        self._staging = _staging(engine, self._buffers, average)
        self._shapes = shapes(engine)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-upload")
        self._closed = threading.Event()
        self._background: Future[None] | None = None
        self._under_way: _Save | None = None
        self._due = False
        self._num_saves = 0
        self._num_uploaded = 0
        self._last_step: int | None = None
        self._failure: tuple[ExitReason, str] | None = None
        self.committed_step: int | None = None
        """The newest step this rank knows to be committed by this attempt."""

    @property
    def failure_message(self) -> str | None:
        """What went wrong in this rank's background work, if anything did."""
        return None if self._failure is None else self._failure[1]

    def word(self, order: Desired = Desired.RUN) -> Word:
        """This rank's next control word."""
        return Word(order, None if self._failure is None else self._failure[0], self._num_uploaded)

    def maybe_save(self, progress: Progress, metrics: dict[str, float], control: ControlWord) -> None:
        """Begin a save if one is due and none is under way. `metrics` are those measured at this step."""
        if self._every_steps is not None and progress.step % self._every_steps == 0:
            self._due = True
            if self._under_way is not None:
                self._join(self._patience_s)
                self.settle(control.agree(self.word()))
        if self._due and self._under_way is None:
            self._begin(progress, metrics)

    def settle(self, agreed: Word) -> None:
        """Let rank 0 commit the save under way if all ranks have uploaded it. Call at each step with the word read."""
        save = self._under_way
        if save is None or agreed.num_uploaded < save.number:
            return
        self._under_way = None
        if self._ranks.is_first:
            self._background = self._thread.submit(self._guarded, partial(self._commit, save))

    def finish(self, progress: Progress, metrics: dict[str, float], control: ControlWord) -> ExitReason | None:
        """Save here unless this step is saved already, and wait until it is committed: None, or why it is not."""
        failure = self.drain(control)
        if failure is None and self._last_step != progress.step:
            self._begin(progress, metrics)
            failure = self.drain(control)
        if failure is None:
            self.committed_step = progress.step
        return failure

    def drain(self, control: ControlWord) -> ExitReason | None:
        """Wait until the save under way, if any, is committed: None, or why it is not."""
        self._join()
        self.settle(control.agree(self.word()))
        self._join()
        return control.agree(self.word()).failure

    def close(self) -> None:
        """Give up what is under way, without waiting for it."""
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _join(self, timeout_s: float = math.inf) -> None:
        """Wait for this rank's background work, so long at most. Asking for orders meanwhile is a sign of life: a long
        upload is no hang, and one that gets nowhere ends by its own deadline."""
        until = time.monotonic() + timeout_s
        while self._background is not None and not self._background.done() and time.monotonic() < until:
            concurrent.futures.wait([self._background], min(_BEAT_S, until - time.monotonic()))
            self._reporter.desired()

    def _begin(self, progress: Progress, metrics: dict[str, float]) -> None:
        self._staging.copy()
        self._due = False
        self._num_saves += 1
        self._last_step = progress.step
        prefix = checkpoint_prefix(self._facts.job_id, progress.step, self._facts.attempt)
        self._under_way = _Save(self._num_saves, progress, dict(metrics), prefix)
        self._background = self._thread.submit(self._guarded, partial(self._upload, self._under_way))

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run background work; its failure travels in the next control word. After one nothing more is written: a
        fenced attempt must not commit again while that word is on its way."""
        if self._failure is not None:
            return
        try:
            work()
        except AlreadyExists as error:
            self._failure = ExitReason.FENCED, f"another process of attempt {self._facts.attempt} wrote {error}"
        except StoreRefused as error:
            self._failure = ExitReason.STORAGE_REFUSED, str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is must reach the other ranks
            self._failure = ExitReason.STORAGE_ERROR, f"{type(error).__name__}: {error}"

    def _upload(self, save: _Save) -> None:
        files = [buffer.describe() for buffer in self._buffers]
        for buffer in self._buffers:
            self._persist(partial(self._store.put, save.prefix + buffer.name, buffer.data))
        # Steps up to here are never done again: what was measured in them must not die with this process.
        self._reporter.flush()
        measured = self._reporter.take_measured()
        record = RankFiles(rank=self._ranks.rank, files=tuple(files), measured=measured).model_dump_json().encode()
        self._persist(partial(self._store.put, self._record_key(save, self._ranks.rank), record))
        failpoint("checkpoint.uploaded", rank=self._ranks.rank, step=save.progress.step)
        self._num_uploaded = save.number

    def _commit(self, save: _Save) -> None:
        records = [
            RankFiles.model_validate_json(self._persist(partial(self._store.get, self._record_key(save, rank))))
            for rank in range(self._ranks.world_size)
        ]
        manifest = self._manifest(save, tuple(file for record in records for file in record.files))
        key = manifest_key(save.prefix)
        failpoint("checkpoint.before_manifest", step=save.progress.step)
        try:
            self._persist(partial(self._store.put, key, manifest.model_dump_json().encode(), if_none_match=True))
        except AlreadyExists:
            # Ours, if an earlier try got through and only its answer was lost.
            if read_manifest(self._store, save.prefix).nonce != manifest.nonce:
                raise
        failpoint("checkpoint.committed", step=save.progress.step)
        self.committed_step = save.progress.step
        self._reporter.checkpoint(manifest.checkpoint_id)

    def _manifest(self, save: _Save, files: tuple[ShardFile, ...]) -> Manifest:
        facts, progress = self._facts, save.progress
        return Manifest(
            checkpoint_id=checkpoint_id(facts.job_id, progress.step, facts.attempt),
            job_id=facts.job_id,
            attempt=facts.attempt,
            step=progress.step,
            position=batch_number(progress.step, progress.skips) * facts.global_batch_size,
            total_steps=facts.total_steps,
            world_size=self._ranks.world_size,
            zero_stage=self._engine.zero_stage,
            optimizer=facts.optimizer,
            optimizer_step=progress.step - progress.skipped_steps,
            skipped_steps=progress.skipped_steps,
            nonfinite_steps=progress.nonfinite_steps,
            skips=progress.skips,
            loss_watch=progress.loss_watch,
            spec_hash=facts.spec_hash,
            training_fingerprint=facts.training_fingerprint,
            data_fingerprint=facts.data_fingerprint,
            versions=versions(),
            metrics={name: value for name, value in save.metrics.items() if math.isfinite(value)},
            parent=facts.parent,
            model=facts.model,
            preprocess=facts.preprocess,
            tensors=self._shapes,
            files=files,
            nonce=uuid4().hex,
            created_at=datetime.now(UTC),
        )

    def _record_key(self, save: _Save, rank: int) -> str:
        return rank_files_key(save.prefix, rank, self._ranks.world_size)

    def _persist(self, action: Callable[[], _T]) -> _T:
        """Do `action`, again and again while the store does not answer, until the deadline."""
        deadline = time.monotonic() + self._upload_deadline_s
        pause_s = 0.5
        while True:
            try:
                return action()
            except StoreRefused:
                raise
            except StorageError:
                if time.monotonic() + pause_s > deadline or self._closed.wait(pause_s):
                    raise
                pause_s = min(2 * pause_s, 30.0)


def read_manifest(store: ObjectStore, prefix: str) -> Manifest:
    """The manifest of the checkpoint under `prefix`.

    Raises:
        CheckpointCorrupt: there is none, or it is not one.
    """
    key = manifest_key(prefix)
    try:
        return Manifest.model_validate_json(store.get(key))
    except NotFound as error:
        raise CheckpointCorrupt(key, "the object is missing") from error
    except ValidationError as error:
        raise CheckpointCorrupt(key, f"not a manifest: {error.errors()[0]['msg']}") from error


def read_weights(store: ObjectStore, prefix: str, weights: Weights = "raw") -> tuple[dict[str, Tensor], Manifest]:
    """Every weight of a checkpoint, or the moving average of every one, whole, fp32 and on the CPU, with its manifest.
    The optimizer's files are not read.

    Raises:
        CheckpointMismatch: it holds no moving average.
        CheckpointCorrupt: an object is missing, torn or altered.
    """
    manifest = read_manifest(store, prefix)
    state = {name: torch.empty(shape, dtype=torch.float32) for name, shape in manifest.tensors.items()}
    kind = _WEIGHT if weights == "raw" else _EMA
    if weights == "ema" and not any(file.role == "ema" for file in manifest.files):
        raise CheckpointMismatch(
            f"weights ema: checkpoint {manifest.checkpoint_id} was trained without train.ema_decay"
        )
    read_into(store, prefix, manifest, (Wanted(name, kind, 0, tensor.view(-1)) for name, tensor in state.items()))
    return state, manifest


def load(
    engine: HasDeepSpeed,
    store: ObjectStore,
    prefix: str,
    training_fingerprint: str,
    average: WeightAverage | None = None,
) -> Progress:
    """Continue exactly where the checkpoint was taken: weights, their average, moments, step. It may come from
    another number of workers and another ZeRO stage. All ranks call it (collective); each reads only what it owns.

    Raises:
        CheckpointMismatch: the checkpoint was trained by another model, data, optimizer, schedule, batch or seed.
        CheckpointCorrupt: an object is missing, torn or altered.
    """
    manifest = read_manifest(store, prefix)
    if manifest.training_fingerprint != training_fingerprint:
        raise CheckpointMismatch(
            f"checkpoint {manifest.checkpoint_id} has training fingerprint {manifest.training_fingerprint}, this job "
            f"{training_fingerprint}: model, data, optim, schedule, batch, precision and seed must be the same to "
            "resume; to start from its weights only, submit a finetune job with init_from"
        )
    if manifest.tensors != shapes(engine):
        raise CheckpointMismatch(f"checkpoint {manifest.checkpoint_id} holds other weights than the model of this job")
    begin_load(engine)
    wanted = [
        Wanted(run.name, kind, run.start, run.of(tensor))
        for run in owned(engine)
        for kind, tensor in _tensors(engine, run)
    ]
    if average is not None:
        slices = average.slices
        wanted += [Wanted(run.name, _EMA, run.start, slices[run.name]) for run in owned(engine)]
    read_into(store, prefix, manifest, wanted)
    finish_load(engine, manifest.optimizer_step)
    is_measured = any(name.startswith("eval/") for name in manifest.metrics)
    return Progress(
        manifest.step,
        manifest.skipped_steps,
        manifest.nonfinite_steps,
        is_measured,
        manifest.skips,
        manifest.loss_watch,
    )


def _tensors(engine: HasDeepSpeed, run: Owned) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hold this run of the weights and of their moments, each with its kind."""
    yield _WEIGHT, run.flat
    if not run.is_frozen:
        for name in moment_names(engine):
            yield name, moment(engine, run.flat, name)


def _buffers(engine: HasDeepSpeed, ranks: Ranks, average: WeightAverage | None) -> tuple[ShardBuffer, ...]:
    """This rank's shard files, in the order of `owned`."""
    runs = list(owned(engine))
    weights = [TensorSlice(key=run.name, name=run.name, kind=_WEIGHT, start=run.start, numel=run.numel) for run in runs]
    moments = [
        TensorSlice(key=f"{kind}/{run.name}", name=run.name, kind=kind, start=run.start, numel=run.numel)
        for run in runs
        if not run.is_frozen
        for kind in moment_names(engine)
    ]
    suffix = f"{ranks.rank:05d}-of-{ranks.world_size:05d}.safetensors"
    pinned = ranks.device.type == "cuda"
    buffers = (
        ShardBuffer(f"shards/weights-{suffix}", ranks.rank, "weights", tuple(weights), pinned),
        ShardBuffer(f"shards/optimizer-{suffix}", ranks.rank, "optimizer", tuple(moments), pinned),
    )
    if average is None:
        return buffers
    averages = [piece.model_copy(update={"kind": _EMA}) for piece in weights]
    return *buffers, ShardBuffer(f"shards/ema-{suffix}", ranks.rank, "ema", tuple(averages), pinned)


@dataclass(frozen=True)
class _Staging:
    """What one save copies, source by source, into the slots of the shard files. Looked up once: at stage 0 these are
    hundreds of small tensors, and the step waits meanwhile. What is saved is only ever written to in place, by steps
    and loads alike: tests/workers/test_recipes.py resumes from it with every optimizer, stage and kind of weight."""

    slots: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]

    def copy(self) -> None:
        """The state as it is now."""
        if self.slots:
            torch._foreach_copy_(self.slots, self.sources, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def _staging(engine: HasDeepSpeed, buffers: tuple[ShardBuffer, ...], average: WeightAverage | None) -> _Staging:
    """From what this rank owns into its shard files."""
    runs = {run.name: (run, dict(_tensors(engine, run))) for run in owned(engine)}
    averages: Mapping[str, Tensor] = {} if average is None else average.slices
    slots, sources = [], []
    for buffer in buffers:
        for piece, slot in buffer.slots():
            run, tensors = runs[piece.name]
            slots.append(slot)
            sources.append(averages[piece.name] if piece.kind == _EMA else run.of(tensors[piece.kind]))
    return _Staging(tuple(slots), tuple(sources))
