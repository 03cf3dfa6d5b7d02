"""What a job will take, before it is queued: memory by ZeRO stage, steps, operations, hours.

Nothing here was measured on a GPU by us; every plan says so in its notes, with the assumption behind its hours.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field

from configs.base import Stored
from configs.cost import (
    DEFAULT_GPU_GIB,
    FIXED_GIB,
    GIB,
    GPUS,
    USABLE,
    Gpu,
    activation_bytes,
    checkpoint_bytes,
    largest_micro_batch,
    macs_per_image,
    num_parameters,
    state_bytes,
    train_flops_per_image,
)
from configs.errors import SpecError, close_matches
from configs.model import NetworkConfig
from configs.resolve import SourceCheckpoint, num_eval_examples, num_train_examples, resolve
from configs.spec import EvaluateJob, ExportJob, ImportJob, JobSpec, SearchJob, TrainingJob
from configs.wire import DatasetCard

ASSUMED_MFU = 0.40
"""Model FLOPs utilisation that hours are computed with. Published plain-ViT training on A100 and H100 reaches 29 to
44 % (NVIDIA NeMo's ViT-g), and 6 to 23 % where small models or the loader are the limit."""
ERROR_BAND_PCT = 50
DECODE_BOUND_IMAGES_PER_S = 600
"""Decoded 224-pixel images per second and worker above which a plan warns (a node of 8 workers with torchvision's CPU
loader reached about 5,000 in public reports)."""


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
    images_per_s: float | None = None
    hours: float | None = None
    gpu_hours: float | None = None
    error_band_pct: int | None = Field(None, description="Of images_per_s and hours, up and down.")
    checkpoint_bytes: int | None = None
    notes: tuple[str, ...] = ()


def plan(
    spec: JobSpec,
    card: DatasetCard | None,
    gpu: str | None = None,
    source: SourceCheckpoint | None = None,
) -> Plan:
    """The plan of a job, resolved or not.

    Args:
        card: of the job's data; None only for an export or import.
        gpu: "H100" or "H100:8" to plan for those instead of what the job asks for.
        source: the checkpoint of `init_from`, if it is known.

    Raises:
        SpecError: the job does not resolve, the GPU is unknown, or the batch cannot be divided among so many.
    """
    if isinstance(spec, ExportJob):
        return _plan_export(source)
    if isinstance(spec, ImportJob):
        return Plan(kind="import", world_size=1, notes=("Reads one file and writes its weights as a checkpoint.",))
    if isinstance(spec, SearchJob):
        message = "kind search: plan its base, which is what a trial takes; POST /v1/plans does so"
        raise SpecError.at("/kind", message, "search", "pretrain, finetune, evaluate, export")
    if isinstance(spec, EvaluateJob):
        return _plan_evaluation(resolve(spec, card, source), card, source)
    assert card is not None
    device, world_size = _parse_gpu(gpu)
    return _plan_training(spec, resolve(spec, card, source), card, device, world_size)


def _parse_gpu(gpu: str | None) -> tuple[Gpu | None, int | None]:
    """ "H100:8" as a GPU and a count."""
    if gpu is None:
        return None, None
    match = re.fullmatch(r"([A-Za-z0-9-]+)(?::([1-9][0-9]{0,3}))?", gpu)
    known = ", ".join(GPUS)
    if match is None:
        raise SpecError.at("/gpu", f"gpu {gpu!r}: expected a GPU and a count, such as H100:8", gpu, known)
    # Ray says A100-80G, people also say A100-80GB and h100.
    name = match[1].upper().removesuffix("B")
    if name not in GPUS:
        hint = close_matches(name, GPUS)
        raise SpecError.at("/gpu", f"unknown GPU {match[1]!r}: expected one of {known}.{hint}", gpu, known)
    return GPUS[name], int(match[2]) if match[2] else None


def _plan_training(
    asked: TrainingJob, spec: TrainingJob, card: DatasetCard, device: Gpu | None, world_size: int | None
) -> Plan:
    batch = spec.train.global_batch_size
    world_size = world_size or max(spec.allowed_world_sizes)
    if batch % world_size:
        raise SpecError.at(
            "/train/global_batch_size",
            f"train.global_batch_size {batch} cannot be divided among {world_size} workers",
            batch,
        )
    on_gpu = device is not None or spec.resources.gpus_per_worker > 0
    device = device or GPUS.get(spec.resources.accelerator or "")
    memory_gib = (device.memory_gib if device else DEFAULT_GPU_GIB) if on_gpu else None
    config = spec.model.network()
    micro = _micro_batch(asked, spec, config, world_size, memory_gib)
    stages = tuple(_stage(spec, config, stage, world_size, micro, memory_gib) for stage in range(4))
    total_steps = spec.schedule.total_steps
    assert total_steps is not None
    num_examples = num_train_examples(spec.data, card)
    images = total_steps * batch
    rate = _images_per_s(spec, config, device, world_size) if on_gpu else None
    hours = images / rate / 3600 if rate else None
    return Plan(
        kind=spec.kind,
        parameters=num_parameters(config),
        macs=macs_per_image(config),
        exaflops=train_flops_per_image(config) * images / 1e18,
        num_examples=num_examples,
        steps=total_steps,
        epochs=images / num_examples,
        global_batch_size=batch,
        micro_batch_size=micro,
        grad_accum_steps=batch // (world_size * micro),
        world_size=world_size,
        allowed_world_sizes=spec.allowed_world_sizes,
        zero_stage=spec.zero.stage,
        accelerator=device.name if device else None,
        memory_gib=memory_gib,
        fits=stages[spec.zero.stage].fits,
        stages=stages,
        images_per_s=rate,
        hours=hours,
        gpu_hours=hours * world_size if hours else None,
        error_band_pct=ERROR_BAND_PCT if rate else None,
        checkpoint_bytes=checkpoint_bytes(config, spec.optim.name, spec.train.ema_decay is not None),
        notes=tuple(_notes(spec, card, device, memory_gib, stages, rate, world_size)),
    )


def _micro_batch(
    asked: TrainingJob, spec: TrainingJob, config: NetworkConfig, world_size: int, memory_gib: float | None
) -> int:
    """The job's own micro-batch where it divides the share; chosen for this GPU and worker count if it said auto."""
    share = spec.train.global_batch_size // world_size
    pinned = spec.train.micro_batch_size
    assert pinned != "auto"
    if asked.train.micro_batch_size != "auto" and share % pinned == 0:
        return pinned
    return _largest(spec, config, spec.zero.stage, world_size, memory_gib) or (1 if spec.data.mix is None else 2)


def _largest(
    spec: TrainingJob, config: NetworkConfig, stage: int, world_size: int, memory_gib: float | None
) -> int | None:
    return largest_micro_batch(
        config,
        global_batch_size=spec.train.global_batch_size,
        world_sizes=(world_size,),
        zero_stage=stage,
        optimizer=spec.optim.name,
        precision=spec.train.precision,
        checkpointing=spec.train.activation_checkpointing,
        memory_gib=memory_gib,
        even=spec.data.mix is not None,
        ema=spec.train.ema_decay is not None,
    )


def _stage(
    spec: TrainingJob, config: NetworkConfig, stage: int, world_size: int, micro: int, memory_gib: float | None
) -> StagePlan:
    state = state_bytes(config, stage, world_size, spec.optim.name, spec.train.ema_decay is not None) / GIB
    activations = activation_bytes(config, micro, spec.train.precision, spec.train.activation_checkpointing) / GIB
    total = state + activations + (FIXED_GIB if memory_gib is not None else 0.0)
    return StagePlan(
        stage=stage,
        state_gib=state,
        activation_gib=activations,
        total_gib=total,
        fits=None if memory_gib is None else total <= memory_gib * USABLE,
        max_micro_batch=None if memory_gib is None else _largest(spec, config, stage, world_size, memory_gib),
    )


def _images_per_s(spec: TrainingJob, config: NetworkConfig, device: Gpu | None, world_size: int) -> float | None:
    peak = device.peak_tflops(spec.train.precision) if device else None
    if peak is None:
        return None
    # Recomputing each block's forward adds a third to the work; MFU counts useful operations only.
    work = train_flops_per_image(config) * (4 / 3 if spec.train.activation_checkpointing else 1)
    return world_size * peak * 1e12 * ASSUMED_MFU / work


def _notes(
    spec: TrainingJob,
    card: DatasetCard,
    device: Gpu | None,
    memory_gib: float | None,
    stages: tuple[StagePlan, ...],
    rate: float | None,
    world_size: int,
) -> list[str]:
    notes: list[str] = []
    if card.note:
        notes.append(card.note)
    if memory_gib is None:
        return [*notes, "On CPU: memory and hours are not planned; no rate of this model on your machine is known."]
    notes.append("Computed, never measured on a GPU by us.")
    own = stages[spec.zero.stage]
    if not own.fits:
        notes.append(_advice(own, stages, memory_gib))
    if rate is not None and device is not None:
        precision = spec.train.precision
        notes.append(
            f"Hours assume {ASSUMED_MFU:.0%} of {device.name}'s peak ({device.peak_tflops(precision):g} TFLOP/s "
            f"{precision}, vendor's figure); take them as ± {ERROR_BAND_PCT} %."
        )
        if rate / world_size > DECODE_BOUND_IMAGES_PER_S:
            notes.append(f"Needs {rate:,.0f} decoded images/s: reading and decoding may be the limit, not the GPUs.")
    elif device is None:
        notes.append(
            f"No GPU named: memory is planned for {DEFAULT_GPU_GIB:g} GiB, hours are not known. Name one (H100:8)."
        )
    else:
        notes.append(f"{device.name} has no bfloat16 matrix units: hours are not known. Use train.precision fp32.")
    return notes


def _advice(own: StagePlan, stages: tuple[StagePlan, ...], memory_gib: float) -> str:
    text = f"Does not fit: {own.total_gib:.1f} GiB of {memory_gib:g} GiB at ZeRO stage {own.stage}"
    if own.max_micro_batch is not None:
        return f"{text}; train.micro_batch_size {own.max_micro_batch} does."
    better = next((s for s in stages if s.max_micro_batch is not None and s.stage > own.stage), None)
    if better is not None:
        return f"{text}; zero.stage {better.stage} with train.micro_batch_size {better.max_micro_batch} does."
    return f"{text}; no stage does. Use more workers, larger GPUs or train.activation_checkpointing."


# -- jobs that do not train --------------------------------------------------------------------------------------------
def _plan_evaluation(spec: EvaluateJob, card: DatasetCard | None, source: SourceCheckpoint | None) -> Plan:
    # resolve() has refused the job otherwise.
    assert spec.data is not None
    assert card is not None
    assert source is not None
    config = source.model
    if spec.image_size is not None:
        config = config.model_copy(update={"image_size": (spec.image_size, spec.image_size)})
    images = num_eval_examples(spec.data, card)
    return Plan(
        kind=spec.kind,
        parameters=num_parameters(config),
        macs=macs_per_image(config),
        exaflops=2 * macs_per_image(config) * images / 1e18,
        num_examples=images,
        world_size=spec.resources.worker_range[1],
        notes=("One forward pass over the split; hours are not planned.",),
    )


def _plan_export(source: SourceCheckpoint | None) -> Plan:
    facts: dict[str, Any] = {}
    if source is not None:
        facts = {"parameters": num_parameters(source.model), "checkpoint_bytes": num_parameters(source.model) * 4}
    return Plan(kind="export", world_size=1, notes=("Reads one checkpoint and writes its weights.",), **facts)
