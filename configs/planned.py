"""What a plan says. Made by `configs.plan.plan`."""

from __future__ import annotations

from pydantic import Field

from configs.base import Stored
from configs.rates import Bound


class StagePlan(Stored):
    """Memory per rank at one ZeRO stage."""

    stage: int
    state_gib: float
    activation_gib: float
    total_gib: float
    """With a fixed allowance for the CUDA context and NCCL."""
    fits: bool | None
    """None: on CPU, where memory is not planned."""
    max_micro_batch: int | None
    """The largest that divides each worker's share of the batch and fits; None: not even one image, or on CPU."""
    hours: float | None = None
    """With the job's micro-batch where it fits, else the largest that does; None: nothing fits, or no rate is known."""
    gpu_hours: float | None = None


class CheapestPlan(Stored):
    """The fewest GPU-hours that fit, of all ZeRO stages, with and without activation checkpointing, and, where no count
    was named, of all numbers of workers that the job may run on. Of equals the job's own stage 0 or 1, else stage 1."""

    zero_stage: int
    activation_checkpointing: bool
    micro_batch_size: int
    grad_accum_steps: int
    world_size: int
    hours: float
    gpu_hours: float


class Plan(Stored):
    """What a job will take. Fields that do not apply to its kind, or cannot be told honestly, are null."""

    kind: str
    parameters: int | None = None
    macs: int | None = Field(None, description="Multiply-accumulates of one image, forward.")
    exaflops: float | None = Field(None, description="Of the whole job, as the paper's Table 6 counts them.")
    num_examples: int | None = None
    steps: int | None = None
    epochs: float | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    grad_accum_steps: int | None = None
    world_size: int | None = None
    allowed_world_sizes: tuple[int, ...] = ()
    zero_stage: int | None = None
    accelerator: str | None = None
    memory_gib: float | None = Field(None, description="Of one GPU.")
    fits: bool | None = Field(None, description="At the job's own ZeRO stage and micro-batch.")
    stages: tuple[StagePlan, ...] = ()
    cheapest: CheapestPlan | None = None
    images_per_s: float | None = None
    bound: Bound | None = Field(None, description="What bounds images_per_s: arithmetic, or decoding images.")
    hours: float | None = None
    gpu_hours: float | None = None
    error_band_pct: int | None = Field(None, description="Of images_per_s and hours, up and down.")
    measured_jobs: int = Field(0, description="How many finished jobs the rate was taken from; 0: it is an assumption.")
    checkpoint_bytes: int | None = None
    notes: tuple[str, ...] = ()
