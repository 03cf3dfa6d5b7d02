"""Batches of training and evaluation images for one rank, made ahead by a background thread.

The samples of step k are a pure function of the seed; ranks and micro-batches only divide them:

    positions  kB ............................................. (k+1)B
    world 2,   | micro 0    | micro 1    | micro 2    | micro 3    |
    accum 2    | rank 0, a0 | rank 1, a0 | rank 0, a1 | rank 1, a1 |
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from configs.data import DataConfig
from configs.lineage import batch_number
from configs.wire import DataSkip
from workers.data.augment import augment, augment_batch, eval_transform
from workers.data.corrupt import CorruptImages, OnCorrupt, no_report
from workers.data.errors import DataError
from workers.data.order import Indices, repeated_at
from workers.data.prefetch import Prefetcher
from workers.data.source import ImageSource

PREFETCH_STEPS = 3
PADDING = -1
"""The sample id of a masked place that stands for no sample."""


@dataclass(frozen=True)
class Batch:
    """`b` places. Where `mask` is false, the place holds no image and must not count."""

    images: Tensor  # uint8 (b, C, h, w)
    labels: Tensor  # int64 (b,)
    sample_ids: Tensor  # int64 (b,): indices into the source
    mask: Tensor  # bool (b,)

    def pin(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return Batch(*(t.pin_memory() for t in (self.images, self.labels, self.sample_ids, self.mask)))


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (b, C, h, w) to float32 (x / 255 - mean) / std, on the images' device. `mean` and `std` hold one value, or
    one per channel; they are passed as scalars, so that no copy to the device is waited for."""
    scaled = images.to(torch.float32).div_(255.0)
    if len(mean) == len(std) == 1:
        return scaled.sub_(mean[0]).div_(std[0])
    for channel in range(scaled.shape[1]):
        scaled[:, channel].sub_(mean[channel % len(mean)]).div_(std[channel % len(std)])
    return scaled


class TrainLoader:
    """Yields, from `start_step` on and without end, one step at a time: a list of this rank's micro-batches. `skips`
    says which data is passed over.

    Micro-step a of rank r is micro-batch a * world_size + r of the step. Unreadable images are counted, reported once
    each through `on_corrupt` and replaced by the next readable one; beyond `data.max_corrupt` of the source (seen by
    this rank) the iterator raises DataError. Close it, or use it in a `with` block.

    Raises:
        ValueError: the global batch is not a multiple of world_size x micro_batch_size.
        DataError: there is nothing to train on.
    """

    def __init__(
        self,
        source: ImageSource,
        data: DataConfig,
        image_hw: tuple[int, int],
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
        skips: tuple[DataSkip, ...] = (),
        on_corrupt: OnCorrupt = no_report,
        pin_memory: bool = False,
    ) -> None:
        if global_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"train.global_batch_size {global_batch_size} is not a multiple of "
                f"{world_size} workers x train.micro_batch_size {micro_batch_size}"
            )
        if len(source) == 0:
            raise DataError(f"the training split {data.train!r} holds no images")
        self.grad_accum_steps = global_batch_size // (micro_batch_size * world_size)
        self.corrupt = CorruptImages(source, data.max_corrupt, on_corrupt)
        steps = _TrainSteps(
            source, data, image_hw, seed, global_batch_size, micro_batch_size, rank, world_size, skips, self.corrupt
        )
        self._prefetcher = Prefetcher(steps.generate(start_step, pin_memory), PREFETCH_STEPS)

    @property
    def wait_s(self) -> float:
        """Seconds the consumer has waited for data so far."""
        return self._prefetcher.wait_s

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        return next(self._prefetcher)

    def close(self) -> None:
        """End the background threads."""
        self._prefetcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _TrainSteps:
    source: ImageSource
    data: DataConfig
    image_hw: tuple[int, int]
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    skips: tuple[DataSkip, ...]
    corrupt: CorruptImages

    def generate(self, start_step: int, pin_memory: bool) -> Iterator[list[Batch]]:
        with ExitStack() as stack:
            pool = _decode_pool(stack, self.data.loader_workers)
            for step in count(start_step):
                batches = self.make(step, pool)
                yield [batch.pin() for batch in batches] if pin_memory else batches

    def positions(self, step: int) -> Indices:
        """Positions of this rank's micro-batches in `step`, in micro-step order: int64 (accum * micro,)."""
        micro_batches = np.arange(self.rank, self.global_batch_size // self.micro_batch_size, self.world_size)
        starts = batch_number(step, self.skips) * self.global_batch_size + micro_batches * self.micro_batch_size
        return (starts[:, None] + np.arange(self.micro_batch_size)).reshape(-1)

    def make(self, step: int, pool: ThreadPoolExecutor | None) -> list[Batch]:
        positions = self.positions(step)
        repeats = self.data.augment.repeats
        sample_ids, epochs = repeated_at(self.seed, len(self.source), positions, repeats)
        together = self.source.read_many(sample_ids)
        if together is not None:
            used = sample_ids
            images = augment_batch(together, self.data.augment, self.image_hw, self.seed, epochs, sample_ids)
        else:
            made = (pool.map if pool else map)(self._view, epochs.tolist(), sample_ids.tolist())
            views, replaced = zip(*made, strict=True)
            used, images = np.array(replaced), torch.from_numpy(np.stack(views))
        parts = (
            images,
            torch.from_numpy(self.source.labels[used]),
            torch.from_numpy(sample_ids),
            torch.ones(len(used), dtype=torch.bool),
        )
        return [Batch(*part) for part in zip(*(t.split(self.micro_batch_size) for t in parts), strict=True)]

    def _view(self, epoch: int, index: int) -> tuple[Tensor, int]:
        """The augmented image for sample `index`, and the index of the image it was made from."""
        image, used = self.corrupt.read_or_substitute(index)
        return augment(image, self.data.augment, self.image_hw, self.seed, epoch, index), used


class EvalLoader:
    """Each iteration is one pass over the source: every sample exactly once among all ranks, the same number of equally
    shaped batches on each. Places left over, and images that cannot be read, are masked.

    Batch k of rank r holds samples [(k * world_size + r) * b, … + b), where b is `batch_size` or the rank's whole share
    if that is smaller.
    """

    def __init__(
        self,
        source: ImageSource,
        data: DataConfig,
        image_hw: tuple[int, int],
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        on_corrupt: OnCorrupt = no_report,
        pin_memory: bool = False,
    ) -> None:
        if len(source) == 0:
            raise DataError("the evaluation split holds no images")
        self._source, self._data, self._image_hw = source, data, image_hw
        self._batch_size = min(batch_size, -(-len(source) // world_size))
        self._rank, self._world_size, self._pin_memory = rank, world_size, pin_memory
        self.corrupt = CorruptImages(source, data.max_corrupt, on_corrupt)

    def __len__(self) -> int:
        """Batches per pass, the same on every rank."""
        return -(-len(self._source) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[Batch]:
        prefetcher = Prefetcher(self._generate(), PREFETCH_STEPS)
        try:
            yield from prefetcher
        finally:
            prefetcher.close()

    def _generate(self) -> Iterator[Batch]:
        with ExitStack() as stack:
            pool = _decode_pool(stack, self._data.loader_workers)
            for k in range(len(self)):
                start = (k * self._world_size + self._rank) * self._batch_size
                ids = np.arange(start, min(start + self._batch_size, len(self._source)), dtype=np.int64)
                batch = self._make(ids, pool)
                yield batch.pin() if self._pin_memory else batch

    def _make(self, ids: Indices, pool: ThreadPoolExecutor | None) -> Batch:
        images = np.zeros((self._batch_size, self._source.channels, *self._image_hw), dtype=np.uint8)
        labels = np.zeros(self._batch_size, dtype=np.int64)
        sample_ids = np.full(self._batch_size, PADDING, dtype=np.int64)
        mask = np.zeros(self._batch_size, dtype=np.bool_)
        labels[: len(ids)] = self._source.labels[ids]
        sample_ids[: len(ids)] = ids
        together = self._source.read_many(ids) if len(ids) else None
        if together is not None:
            images[: len(ids)] = eval_transform(together, self._data, self._image_hw).numpy()
            mask[: len(ids)] = True
        else:
            for place, view in enumerate((pool.map if pool else map)(self._view, ids.tolist())):
                if view is not None:
                    images[place], mask[place] = view.numpy(), True
        return Batch(*map(torch.from_numpy, (images, labels, sample_ids, mask)))

    def _view(self, index: int) -> Tensor | None:
        image = self.corrupt.read(index)
        return None if image is None else eval_transform(image, self._data, self._image_hw)


def _decode_pool(stack: ExitStack, num_threads: int) -> ThreadPoolExecutor | None:
    """Decode threads (Pillow releases the interpreter lock), or None: the prefetch thread decodes."""
    if num_threads == 0:
        return None
    return stack.enter_context(ThreadPoolExecutor(num_threads, thread_name_prefix="decode"))
