"""Forward and backward over one global batch: this rank's micro-batches, their gradients added up in the engine."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.spec import TrainingJob
from vit.losses import classification_loss
from vit.masked import draw_corruption, masked_patch_loss, mean_colours
from workers.data.loader import Batch, normalise
from workers.data.mix import apply_mixing, draw_mixing
from workers.distributed import Ranks
from workers.engine import Engine
from workers.randomness import seed_micro_step


@dataclass(frozen=True)
class Accumulated:
    """What the micro-batches came to. The tensors are scalars on the device: nobody has waited for them yet."""

    loss: Tensor
    right: Tensor | None
    """Of masked patch prediction: the share of corrupted patches whose colour was told."""
    samples_crc32: int
    """Which samples they were, as a number that two runs can be compared by."""


def accumulate(
    spec: TrainingJob, engine: Engine, micro_batches: Sequence[Batch], ranks: Ranks, step: int
) -> Accumulated:
    """For each micro-batch of `step`: seed, mix, forward, loss, backward. The engine's update is the caller's."""
    data, options, num_classes = spec.data, spec.train, spec.model.num_classes
    assert num_classes is not None, "classes are those of the data in a resolved job"
    stride = spec.model.stride if options.objective == "masked_patch" else None
    mixing = None if data.mix is None else draw_mixing(data.mix, spec.model.image_hw, options.seed, step)
    loss, right = torch.zeros((), device=ranks.device), torch.zeros((), device=ranks.device)
    samples_crc32 = 0
    for number, batch in enumerate(micro_batches):
        seed_micro_step(options.seed, step, number * ranks.world_size + ranks.rank)
        pixels = batch.images.to(ranks.device, non_blocking=True)
        images = normalise(pixels, data.mean, data.std)
        if stride is None:
            labels = batch.labels.to(ranks.device, non_blocking=True)
            targets = labels
            if mixing is not None:
                images, targets = apply_mixing(mixing, images, labels, num_classes)
            micro_loss = classification_loss(engine.forward(images), targets, options.loss, options.label_smoothing)
        else:
            micro_loss, micro_right = _predict_masked(engine, pixels, images, stride)
            right += micro_right / len(micro_batches)
        engine.backward(micro_loss)
        loss += micro_loss.detach() / len(micro_batches)
        samples_crc32 = zlib.crc32(batch.sample_ids.numpy().tobytes(), samples_crc32)
    return Accumulated(loss, None if stride is None else right, samples_crc32)


def _predict_masked(engine: Engine, pixels: Tensor, images: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of masked patch prediction on a micro-batch, whose corruption is drawn from torch's generators,
    as dropout is."""
    colours = mean_colours(pixels, stride)
    num_images, num_patches = colours.shape
    corruption = draw_corruption(num_images, num_patches, images.device)
    return masked_patch_loss(engine.forward(images, sources=corruption.sources), colours, corruption.chosen)
