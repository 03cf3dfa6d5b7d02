"""What a Vision Transformer costs: parameters, multiply-accumulates, memory. Arithmetic only; no torch.

    D  embed_dim   M  mlp_dim   L  depth   H  num_heads   C  num_classes
    N  tokens (with the class token)       P  parameters  w  workers

Counts of parameters are exact. Multiply-accumulates count every matrix product (attention's two included) and nothing
else, which reproduces the exaFLOPs of Table 6 of the paper for ViTs and hybrids within 2 %, B/32 within 3 %. Memory is
a model of what PyTorch and DeepSpeed keep: on CPU, tests check it against autograd's saved tensors and against
DeepSpeed's engine; on one H200 peaks were 75 to 98 % of it (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Literal

from configs.conv_cost import NORM_STATISTICS, Backbone
from configs.model import BitConfig, NetworkConfig, VitConfig

Precision = Literal["fp32", "bf16"]
GIB = 1024**3
FP32 = 4
BF16 = 2

_kept = lru_cache(maxsize=1024)
"""A plan asks the same of a model for each ZeRO stage: that took a twentieth of the time of a submission."""

DEFAULT_GPU_GIB = 80.0
"""Assumed where a job names no accelerator."""
USABLE = 0.92
"""Share of a GPU's memory planned with: the rest is lost to the allocator's fragmentation."""
FIXED_GIB = 1.5
"""CUDA context, cuBLAS workspace, NCCL buffers and DeepSpeed's buckets of a process (an allowance, not measured)."""
MAX_CPU_MICRO_BATCH = 128


@dataclass(frozen=True)
class Gpu:
    """Memory and peak rates of a GPU as its vendor gives them (not verified by us): dense, without sparsity."""

    name: str
    memory_gib: float
    bf16_tflops: float | None
    """None: no bfloat16 matrix units."""
    fp32_tflops: float
    link_gb_per_s: float
    """To its neighbours in a server, one way: NVLink, or PCIe where there is none."""

    def peak_tflops(self, precision: Precision) -> float | None:
        return self.bf16_tflops if precision == "bf16" else self.fp32_tflops


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("V100", 16, None, 15.7, 150.0),
        Gpu("T4", 16, None, 8.1, 16.0),
        Gpu("A10G", 24, 70.0, 31.2, 32.0),
        Gpu("L4", 24, 121.0, 30.3, 16.0),
        Gpu("L40S", 48, 362.0, 91.6, 32.0),
        Gpu("A100-40G", 40, 312.0, 19.5, 300.0),
        Gpu("A100", 80, 312.0, 19.5, 300.0),
        Gpu("A100-80G", 80, 312.0, 19.5, 300.0),
        Gpu("H100", 80, 989.0, 67.0, 450.0),
        Gpu("H200", 141, 989.0, 67.0, 450.0),
        Gpu("B200", 180, 2250.0, 80.0, 900.0),
    )
}
"""By Ray's accelerator type. "A100" alone is taken to be the 80 GB model."""


# -- parameters and operations -----------------------------------------------------------------------------------------
def num_patches(config: VitConfig) -> int:
    rows, columns = config.grid
    return rows * columns


def resnet_of(config: BitConfig) -> Backbone:
    """The convolutions of a BiT ResNet on its own image size."""
    return Backbone(config.resnet.layers, config.resnet.width, config.in_channels, config.image_size, preact=True)


def stem_of(config: VitConfig) -> Backbone | None:
    """A hybrid's convolutions on its own image size."""
    if config.stem is None:
        return None
    return Backbone(config.stem.layers, config.stem.width, config.in_channels, config.image_size)


@_kept
def num_parameters(config: NetworkConfig) -> int:
    """Exact number of parameters of `vit.build(config)`."""
    if isinstance(config, BitConfig):
        resnet = resnet_of(config)
        features = resnet.num_features
        return resnet.num_parameters + 2 * features + (features + 1) * config.num_classes
    dim, mlp = config.embed_dim, config.mlp_dim
    backbone = stem_of(config)
    stem = backbone.num_parameters if backbone else 0
    patch_embed = stem + config.patch_size**2 * config.patch_channels * dim + dim
    prefix = dim * config.num_prefix + (0 if config.has_classifier else dim)  # with the [mask]
    attention = (3 * dim * dim + 3 * dim) + (dim * dim + dim)
    mlp_block = (dim * mlp + mlp) + (mlp * dim + dim)
    layer_scale = 0 if config.layer_scale is None else 2 * dim
    qk_norm = 4 * config.head_dim if config.qk_norm else 0
    block = attention + mlp_block + 4 * dim + layer_scale + qk_norm
    pre_logits = dim * dim + dim if config.head == "mlp" else 0
    head = dim * config.num_classes + config.num_classes
    # The learned query, attention, a norm and an MLP.
    pool = dim + attention + mlp_block + 2 * dim if config.pool == "map" else 0
    positions = _num_positions(config)
    return patch_embed + prefix + positions + config.depth * block + 2 * dim + pool + pre_logits + head


def _num_positions(config: VitConfig) -> int:
    """Parameters of position embeddings, fixed ones included."""
    times = config.depth if config.pos_embed_at == "every_layer" else 1
    rows, columns = config.grid
    match config.pos_embed:
        case "none":
            return 0
        case "learned_2d":
            return times * (rows + columns) * (config.embed_dim // 2)
        case "relative":
            return config.depth * num_offsets(config) * config.head_dim
        case _:
            return times * config.num_tokens * config.embed_dim


def num_offsets(config: VitConfig) -> int:
    """1-D offsets between two patches."""
    return 2 * num_patches(config) - 1


@_kept
def macs_per_image(config: NetworkConfig) -> int:
    """Multiply-accumulates of one image's forward pass: every linear layer, convolution, and attention's two
    products."""
    if isinstance(config, BitConfig):
        resnet = resnet_of(config)
        return resnet.macs + resnet.num_features * config.num_classes
    dim, tokens = config.embed_dim, config.num_tokens
    backbone = stem_of(config)
    patch_embed = num_patches(config) * config.patch_size**2 * config.patch_channels * dim
    patch_embed += backbone.macs if backbone else 0
    linears = tokens * (4 * dim * dim + 2 * dim * config.mlp_dim)
    attention = 2 * tokens * tokens * dim
    if config.pos_embed == "relative":
        attention += num_patches(config) * num_offsets(config) * dim
    head = dim * config.num_classes + (dim * dim if config.head == "mlp" else 0)
    if not config.has_classifier:
        head *= num_patches(config)
    if config.pool == "map":
        patches = num_patches(config)
        head += 2 * patches * dim * dim + 2 * patches * dim + 2 * dim * dim + 2 * dim * config.mlp_dim
    return patch_embed + config.depth * (linears + attention) + head


def train_flops_per_image(config: NetworkConfig) -> int:
    """Floating-point operations of one image's forward and backward pass: 6 x MAC (2 per MAC, backward twice the
    forward). Table 6 of the paper follows this rule."""
    return 6 * macs_per_image(config)


# -- memory ------------------------------------------------------------------------------------------------------------
def optimizer_bytes_per_parameter(optimizer: str) -> int:
    """Adam and LAMB keep two fp32 moments, SGD with momentum one."""
    return {"adamw": 2, "lamb": 2, "sgd": 1}[optimizer] * FP32


def built_stage(zero_stage: int, world_size: int) -> int:
    """The ZeRO stage that is built where `zero_stage` was asked for. On one worker there is nothing to partition over:
    stages 1 to 3 hold more than stage 0 there and take longer (on an H200 a step of ViT-B/16 by 13 % and 140 %)."""
    return zero_stage if world_size > 1 else 0


def state_bytes(config: NetworkConfig, zero_stage: int, world_size: int, optimizer: str, ema: bool = False) -> int:
    """Bytes each rank holds between steps, with fp32 parameters (bf16 is autocast: parameters stay fp32).

    Per parameter: weight 4, gradient 4, moments 8 (AdamW) or 4 (SGD). A stage partitions over the w workers: 1 the
    moments, 2 also the gradients, 3 also the weights. Stages 1 to 3 keep a second fp32 copy of the rank's own part of
    the weights, which the optimizer updates (DeepSpeed 0.19: single_partition_of_fp32_groups of stage_1_and_2.py,
    fp32_partitioned_groups_flat of stage3.py; the latter means to share what is fp32 already, and does not).
    Checked against DeepSpeed's engine on CPU by a test. One worker builds stage 0 (`built_stage`).
    """
    zero_stage = built_stage(zero_stage, world_size)
    parameters = num_parameters(config)
    shard = -(-parameters // world_size)
    moments = optimizer_bytes_per_parameter(optimizer)
    weights = FP32 * (shard if zero_stage >= 3 else parameters)
    master = FP32 * shard if zero_stage >= 1 else 0
    gradients = FP32 * (shard if zero_stage >= 2 else parameters)
    average = FP32 * shard if ema else 0  # cut among the ranks at every stage
    return average + weights + master + gradients + moments * (shard if zero_stage >= 1 else parameters)


def saved_bytes_per_block(config: VitConfig, precision: Precision) -> int:
    """Bytes autograd keeps of one image in one pre-LN block with fused attention (SDPA).

    Per token, with a = 4 bytes in fp32 and 2 under bf16 autocast (layer norm and the residual stream stay fp32):

        input of norm1 (residual)     4 D     fp32; mean and 1/std: 8 bytes
        input of qkv                  a D     norm1's output (its bf16 copy under autocast)
        q, k, v                       3 a D   views of qkv's output
        attention output              a D     also the input of proj
        log-sum-exp                   4 H     fp32
        input of norm2 (residual)     4 D     fp32; mean and 1/std: 8 bytes
        input of fc1                  a D     norm2's output (its bf16 copy under autocast)
        input of GELU                 a M     fc1's output
        input of fc2                  a M     GELU's output, after dropout

    Dropout adds its masks, 2 D + M elements of one byte. (CPU kernels keep them in the activation's own type.)
    LayerScale adds what it multiplies, the output of each branch: 2 a D. QK-norm adds its inputs in fp32 and its
    results, of queries and keys: 2 (4 + a) D, less 2 a D in fp32, where the inputs are views of qkv's output; and their
    means and 1/std: 16 H.
    """
    dim, mlp = config.embed_dim, config.mlp_dim
    width = FP32 if precision == "fp32" else BF16
    residual = 2 * (FP32 * dim + 2 * FP32)
    per_token = residual + width * (6 * dim + 2 * mlp) + FP32 * config.num_heads
    if config.dropout > 0.0:
        per_token += 2 * dim + mlp
    if config.layer_scale is not None:
        per_token += 2 * width * dim
    if config.qk_norm:
        per_token += 2 * dim * (FP32 if precision == "fp32" else FP32 + BF16) + 16 * config.num_heads
    block = config.num_tokens * per_token
    if config.pos_embed == "relative":
        block += _saved_by_relative_attention(config, precision)
    return block


def _saved_by_relative_attention(config: VitConfig, precision: Precision) -> int:
    """Beyond what fused attention keeps: the softmax's result, H N N in fp32, its bf16 copy under autocast, and the
    patches' queries again where a prefix lies between; no log-sum-exp."""
    tokens, width = config.num_tokens, FP32 if precision == "fp32" else BF16
    weights = config.num_heads * tokens * tokens * (FP32 if precision == "fp32" else FP32 + BF16)
    queries = width * num_patches(config) * config.embed_dim if config.num_prefix else 0
    return weights + queries - FP32 * config.num_heads * tokens


def saved_bytes_outside_blocks(config: VitConfig, precision: Precision) -> int:
    """Bytes autograd keeps of one image before and after the blocks: the image as the patch embedding reads it (of a
    hybrid what its stem keeps), the input of the final norm, the head's input (and what pre_logits adds), and about
    three times the logits in fp32.

    In fp32 the class token that the head reads is a view, which keeps the final norm's whole output alive. With
    `pool: patch_mean` the norm reads the mean alone.
    """
    dim, tokens = config.embed_dim, config.num_tokens
    width = FP32 if precision == "fp32" else BF16
    height, columns = config.image_size
    image = width * config.in_channels * height * columns
    if (backbone := stem_of(config)) is not None:
        image = backbone.saved_bytes(precision == "bf16") + _feature_copy_bytes(backbone, precision)
    norm = (1 if config.pool == "patch_mean" else tokens) * (FP32 * dim + 2 * FP32)
    pooled = width * dim * (tokens if precision == "fp32" and config.pool == "cls" else 1)
    pooled += _saved_by_map_head(config, width) if config.pool == "map" else 0
    head = pooled + (width * dim if config.head == "mlp" else 0) + 3 * FP32 * config.num_classes
    if not config.has_classifier:
        head = _saved_by_patch_head(config, width)
    mask = tokens * dim if config.dropout > 0.0 else 0
    return image + norm + head + mask


def _saved_by_map_head(config: VitConfig, width: int) -> int:
    """Of attention pooling: the patches as it reads them, their keys and values, and one token's way through attention,
    norm and MLP."""
    dim, heads = config.embed_dim, config.num_heads
    tokens = width * num_patches(config) * 3 * dim
    return tokens + width * (3 * dim + 2 * config.mlp_dim) + FP32 * (dim + 2 + heads)


def _saved_by_patch_head(config: VitConfig, width: int) -> int:
    """Of masked patch prediction: the patches' embeddings before some take another's place, what the head reads of
    every patch and its logits, where each embedding came from (int64, and whether it is the [mask]), which patches are
    corrupted (int64), and the log-softmax of the corrupted half in fp32."""
    patches = num_patches(config)
    whole = patches * (FP32 * config.embed_dim + width * (config.embed_dim + config.num_classes) + 17)
    return whole + FP32 * config.num_classes * (patches // 2)


def weight_copy_bytes(config: VitConfig, precision: Precision) -> int:
    """Bytes of the bf16 copies of the kernels that autocast makes once per forward pass and autograd keeps, and of a
    hybrid's standardised kernels."""
    backbone = stem_of(config)
    standardised = backbone.kernel_copy_bytes(precision == "bf16") if backbone else 0
    if precision == "fp32":
        return standardised
    dim = config.embed_dim
    kernels = config.depth * (4 * dim * dim + 2 * dim * config.mlp_dim)
    kernels += config.patch_size**2 * config.patch_channels * dim + dim * config.num_classes
    kernels += dim * dim if config.head == "mlp" else 0
    kernels += 4 * dim * dim + 2 * dim * config.mlp_dim if config.pool == "map" else 0
    kernels += _num_positions(config) if config.pos_embed == "relative" else 0
    return standardised + BF16 * kernels


def _feature_copy_bytes(backbone: Backbone, precision: Precision) -> int:
    """Of the feature map's bf16 copy that the patch embedding reads."""
    rows, columns = backbone.feature_hw
    return BF16 * backbone.num_features * rows * columns if precision == "bf16" else 0


@_kept
def activation_bytes(
    config: NetworkConfig, micro_batch_size: int, precision: Precision, checkpointing: bool = False
) -> int:
    """Peak bytes of activations on a rank: what autograd saves for one micro-batch, the bf16 weight copies, and one
    block's worth of temporaries for the backward pass that runs while all of it is still held.

    With activation checkpointing only each block's input is kept (4 D bytes per token), plus one block whole while it
    is recomputed.
    """
    if isinstance(config, BitConfig):
        return _resnet_activation_bytes(config, micro_batch_size, precision, checkpointing)
    block = saved_bytes_per_block(config, precision)
    block_input = config.num_tokens * config.embed_dim * FP32
    kept = config.depth * block_input + block if checkpointing else config.depth * block
    per_image = kept + block + saved_bytes_outside_blocks(config, precision)
    if checkpointing and (backbone := stem_of(config)) is not None:
        is_bf16 = precision == "bf16"
        per_image -= backbone.saved_bytes(is_bf16) - backbone.checkpointed_bytes(is_bf16)
    return micro_batch_size * per_image + weight_copy_bytes(config, precision)


def _resnet_activation_bytes(
    config: BitConfig, micro_batch_size: int, precision: Precision, checkpointing: bool
) -> int:
    """As `activation_bytes`. With checkpointing every bottleneck's input is kept, and the largest bottleneck whole
    while it is recomputed."""
    is_bf16 = precision == "bf16"
    resnet = resnet_of(config)
    kept = resnet.checkpointed_bytes(is_bf16) if checkpointing else resnet.saved_bytes(is_bf16)
    per_image = kept + resnet.largest_block_bytes(is_bf16) + saved_bytes_by_resnet_head(config, precision)
    return micro_batch_size * per_image + resnet_copy_bytes(config, precision)


def saved_bytes_by_resnet_head(config: BitConfig, precision: Precision) -> int:
    """Bytes autograd keeps of one image after the stages: the feature map before and after the last norm and ReLU in
    fp32, the norm's statistics, the classifier's input, and about three times the logits in fp32."""
    resnet = resnet_of(config)
    rows, columns = resnet.feature_hw
    maps = 2 * FP32 * resnet.num_features * rows * columns
    return (
        maps
        + NORM_STATISTICS
        + (FP32 if precision == "fp32" else BF16) * resnet.num_features
        + 3 * FP32 * config.num_classes
    )


def resnet_copy_bytes(config: BitConfig, precision: Precision) -> int:
    """Bytes of standardised kernels, and of the classifier's bf16 copy under autocast."""
    resnet = resnet_of(config)
    head = 0 if precision == "fp32" else BF16 * resnet.num_features * config.num_classes
    return resnet.kernel_copy_bytes(precision == "bf16") + head


def checkpoint_bytes(config: NetworkConfig, optimizer: str, ema: bool = False) -> int:
    """Bytes of a checkpoint in the object store: fp32 weights, their moving average if there is one, and moments."""
    return num_parameters(config) * (FP32 + (FP32 if ema else 0) + optimizer_bytes_per_parameter(optimizer))


# -- micro-batches -----------------------------------------------------------------------------------------------------
def divisors(number: int) -> Iterator[int]:
    """All divisors, largest first."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    large = [number // d for d in small if d * d != number]
    yield from large
    yield from reversed(small)


def largest_micro_batch(
    config: NetworkConfig,
    *,
    global_batch_size: int,
    world_sizes: Iterable[int],
    zero_stage: int,
    optimizer: str,
    precision: Precision,
    checkpointing: bool,
    memory_gib: float | None,
    even: bool = False,
    ema: bool = False,
) -> int | None:
    """The largest micro-batch that divides each worker's share of the batch at every world size and fits into memory
    at the smallest one; None if not even one image does.

    Args:
        memory_gib: of the GPU; None: CPU, where up to 128 images are taken.
        even: take even numbers only.
        ema: a moving average of the weights is kept.
    """
    sizes = sorted(set(world_sizes))
    share = 0
    for world_size in sizes:
        share = gcd(share, global_batch_size // world_size)
    candidates = [d for d in divisors(share) if not (even and d % 2)]
    if memory_gib is None:
        return next((d for d in candidates if d <= MAX_CPU_MICRO_BATCH), None)
    budget = (memory_gib * USABLE - FIXED_GIB) * GIB - state_bytes(config, zero_stage, sizes[0], optimizer, ema)
    return next(
        (d for d in candidates if activation_bytes(config, d, precision, checkpointing) <= budget),
        None,
    )
