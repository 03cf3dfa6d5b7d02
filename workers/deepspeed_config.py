"""The only file that spells DeepSpeed's configuration keys: a pure function of what the job asks for."""

from __future__ import annotations

from typing import Any

BUCKET_ELEMENTS = 50_000_000
"""Gradients and weights travel in buckets of this many numbers (200 MB of fp32; DeepSpeed's default: 2 GB)."""


def deepspeed_config(
    *,
    zero_stage: int,
    precision: str,
    clip_grad_norm: float | None,
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
) -> dict[str, Any]:
    """DeepSpeed's configuration. What is left out on purpose:

    - `optimizer`, `scheduler`: the engine is given a torch optimizer, and the loop sets the learning rate.
    - `bf16`: at stage 0 that block takes one optimizer step before training, at stage 1 it accumulates gradients in
      bfloat16. bf16 here is fp32 parameters with autocast, at every stage, so that all stages give the same losses.
    - clipping at stage 0: the engine needs the gradient norm before the step anyway, and clips with it.

    Raises:
        ValueError: the global batch is not a multiple of micro_batch_size * world_size.
    """
    if global_batch_size % (micro_batch_size * world_size):
        raise ValueError(
            f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {world_size} workers"
        )
    config: dict[str, Any] = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": global_batch_size // (micro_batch_size * world_size),
        "gradient_clipping": (clip_grad_norm or 0.0) if zero_stage > 0 else 0.0,
        "zero_optimization": {"stage": zero_stage},
        # DeepSpeed tests its own Adam with ZeRO; ours is torch's, which the parity tests cover.
        "zero_allow_untested_optimizer": True,
    }
    if zero_stage > 0:
        config["zero_optimization"] |= {
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "overlap_comm": zero_stage == 3,
        }
    if zero_stage in (1, 2):
        config["zero_optimization"] |= {
            "allgather_bucket_size": BUCKET_ELEMENTS,
            # Each gradient goes to the rank that owns it only. DeepSpeed's default is to send all to all ranks: half as
            # much again per step, at stage 2 per micro-batch, of which each rank throws most away.
            "use_multi_rank_bucket_allreduce": False,
        }
    if zero_stage == 3:
        config["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            # Every parameter is partitioned: checkpoints rely on it (workers/owned.py).
            "stage3_param_persistence_threshold": 0,
            # It would replace torch's linear for the whole process by one that rounds twice in bf16: other losses than
            # at stages 0 to 2, and other losses for whatever runs in this process afterwards.
            "memory_efficient_linear": False,
        }
    if precision == "bf16":
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            # None: gradients are reduced in fp32 whatever layer they belong to.
            "lower_precision_safe_modules": [],
        }
    return config
