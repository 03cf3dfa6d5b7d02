"""How fast a job can go: arithmetic, what ranks send each other, and the processor's share, the decoding of images.

Vendors' figures and assumptions, each named where it is used. `configs.calibration` puts measured rates in their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.cost import Gpu, num_parameters, train_flops_per_image
from configs.data import DataConfig, SyntheticSource, TorchvisionSource
from configs.model import NetworkConfig

ASSUMED_MFU = 0.40
"""Model FLOPs utilisation that hours are computed with. Published plain-ViT training on A100 and H100 reaches 29 to
44 % (NVIDIA NeMo's ViT-g), and 6 to 23 % where small models or the loader are the limit. On one H200 we measured 30 %
with B/16 (36 % compiled) and 40 % with H/14 (docs/gpu.md)."""
RECOMPUTED = 4 / 3
"""Work with activation checkpointing, of that without: each block's forward is done again."""
DECODED_PER_CORE = {"decode": 350.0, "read": 50_000.0}
"""Images per second and core, measured on one core of an AMD EPYC server: a JPEG of 500 x 375 pixels and 77 KB decoded
and cropped (Inception) to 224 takes 2.7 ms (tests/benchmarks/decode.py); images that lie uncompressed in one file
(MNIST's format, CIFAR) take 18 us. RandAugment and its like are not in it."""
GPUS_PER_NODE = 8
NETWORK_GB_PER_S = 50.0
"""Per GPU between nodes: one 400 Gb/s adapter each, as in the vendors' servers of 8 GPUs."""
LINK_SHARE = 0.7
"""Of a link's peak that collectives reach."""
OVERLAP = 2 / 3
"""Of a step in which gradients can travel unseen: the backward pass."""
_WEIGHT_BYTES = 4
_UNCOMPRESSED = ("FashionMNIST", "MNIST", "CIFAR10", "CIFAR100", "SVHN")

Bound = Literal["compute", "decode"]


@dataclass(frozen=True)
class Rate:
    """Images per second of a whole job, and what bounds it."""

    images_per_s: float
    bound: Bound


def exchanged_weights(zero_stage: int, grad_accum_steps: int) -> float:
    """What a rank of n sends per step, in units of the weights times (n - 1) / n (docs/benchmarks.md, Bytes; stage 3
    as for models too large to keep what was gathered)."""
    match zero_stage:
        case 0 | 1:
            return 2.0
        case 2:
            return 1.0 + grad_accum_steps
        case _:
            return 3.0 * grad_accum_steps


def compute_rate(
    config: NetworkConfig,
    *,
    flops_per_s: float,
    gpu: Gpu | None,
    world_size: int,
    global_batch_size: int,
    zero_stage: int,
    grad_accum_steps: int,
    checkpointing: bool,
) -> float:
    """Images per second that `world_size` workers of `flops_per_s` useful FLOP/s each can train on.

    What a rank sends hides behind the backward pass; only what does not fit there is added to the step. Workers that
    are no known GPU (gpu=None) are taken to send for nothing: their measured rate has it in it.
    """
    work = train_flops_per_image(config) * (RECOMPUTED if checkpointing else 1.0)
    step_s = work * global_batch_size / world_size / flops_per_s
    if gpu is not None and world_size > 1:
        share = (world_size - 1) / world_size
        sent = exchanged_weights(zero_stage, grad_accum_steps) * share * num_parameters(config) * _WEIGHT_BYTES
        link = gpu.link_gb_per_s if world_size <= GPUS_PER_NODE else min(gpu.link_gb_per_s, NETWORK_GB_PER_S)
        step_s += max(0.0, sent / (link * 1e9 * LINK_SHARE) - OVERLAP * step_s)
    return global_batch_size / step_s


def decode_rate(data: DataConfig, world_size: int, cpus_per_worker: int) -> float | None:
    """Images per second that the loaders can bring; None for images that are made, not read."""
    if isinstance(data.source, SyntheticSource):
        return None
    is_read = isinstance(data.source, TorchvisionSource) and data.source.name in _UNCOMPRESSED
    return DECODED_PER_CORE["read" if is_read else "decode"] * world_size * cpus_per_worker


def lesser(compute: float, decode: float | None) -> Rate:
    """The rate of the slower of the two."""
    if decode is not None and decode < compute:
        return Rate(decode, "decode")
    return Rate(compute, "compute")
