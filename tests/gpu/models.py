"""Whole models on a GPU: how fast, how much memory, how often the host waits; beside a bare torch loop."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

import vit
from configs.cost import (
    FIXED_GIB,
    GIB,
    activation_bytes,
    built_stage,
    largest_micro_batch,
    state_bytes,
    train_flops_per_image,
)
from configs.datasets import card_for
from configs.load import parse_spec
from configs.resolve import resolve
from tests.gpu.processes import on_ranks, say, synchronise
from vit.losses import classification_loss
from vit.optim import param_groups
from workers.distributed import Ranks
from workers.engine import build_engine
from workers.randomness import seed_micro_step
from workers.throughput import peak_flops

MEMORY_BAND = 0.15
"""How far the measured peak may lie above what the planner says."""
WARMUP_STEPS = 3
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Way:
    """One way to train a model: ours, with options of `train`, or an opponent's."""

    name: str
    train: dict[str, Any] = field(default_factory=dict)
    zero_stage: int = 1
    is_ours: bool = True


OURS = Way("ours")
BARE = Way("bare torch", is_ours=False)
COMPILED = Way("ours, compiled", {"compile": True})
BARE_COMPILED = Way("bare torch, compiled", {"compile": True}, is_ours=False)
RECOMPUTED = Way("ours, activation checkpointing", {"activation_checkpointing": True})
PARTITIONED = Way("ours, ZeRO 3", zero_stage=3)
TIMM = Way("bare torch, timm's model", is_ours=False)


def check_models(
    variants: list[str], world_size: int, device: str, steps: int, has_compiled: bool = True
) -> dict[str, Any]:
    """Each variant in every way, one after the other in the same processes."""
    gib = torch.cuda.get_device_properties(0).total_memory / GIB if device == "cuda" else 0.0
    image_size = 224 if device == "cuda" else 32
    runs = []
    for variant in variants:
        planned = []
        for way in ways(world_size, device, has_compiled):
            micro_batch = planned_micro_batch(variant, image_size, world_size, gib, way) if device == "cuda" else 2
            spec = model_spec(variant, image_size, micro_batch * world_size, micro_batch, way.zero_stage, **way.train)
            planned.append((way, spec))
        measured = on_ranks(world_size, device, train_in_every_way, variant, planned, steps)[0]
        rates: dict[str, float] = {}
        for (way, spec), found in zip(planned, measured, strict=True):
            run = judged(variant, world_size, way, spec, found)
            rates[way.name] = run["images_per_s"]
            opponent = rates.get(BARE_COMPILED.name if "compile" in way.train else BARE.name)
            runs.append(run | {"to_bare": run["images_per_s"] / opponent if opponent and way.is_ours else None})
    return {"runs": runs, "memory_band": MEMORY_BAND, "passed": all(run["passed"] for run in runs)}


def ways(world_size: int, device: str, has_compiled: bool) -> list[Way]:
    """What is compared where: each opponent before ours. On one device nothing is partitioned (`built_stage`); on a CPU
    compiling takes minutes, and tests/workers/test_compile.py does it."""
    found = [BARE, OURS, RECOMPUTED, TIMM]
    if world_size > 1:
        found.append(PARTITIONED)
    if device == "cuda" and has_compiled:
        found += [BARE_COMPILED, COMPILED]
    return found


def _told(run: dict[str, Any]) -> str:
    mfu, peak = run["mfu"], run["peak_gib"]
    memory = "" if peak is None else f", {peak:.1f} GiB at the most, {run['planned_gib']:.1f} planned"
    return f"{run['images_per_s']:.0f} images/s{'' if mfu is None else f', MFU {100 * mfu:.0f} %'}{memory}"


def model_spec(variant: str, image_size: int, batch: int, micro_batch: int, stage: int, **train: Any) -> Any:
    """A resolved pre-training job on generated images."""
    raw = {
        "kind": "pretrain",
        "model": {"variant": variant, "image_size": image_size, "num_classes": 1000},
        "data": {"source": {"type": "synthetic", "num_classes": 1000, "image_size": image_size}},
        "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": WEIGHT_DECAY},
        "schedule": {"total_steps": 100},
        "train": {"global_batch_size": batch, "micro_batch_size": micro_batch, "precision": "bf16"} | train,
        "zero": {"stage": stage},
        "resources": {"workers": 1, "gpus_per_worker": 0},
    }
    spec = parse_spec(raw)
    return resolve(spec, card_for(spec.data.source, {}), None)


def planned_micro_batch(variant: str, image_size: int, world_size: int, gib: float, way: Way) -> int:
    """The largest power of two up to 256 that the planner lets fit."""
    config = model_spec(variant, image_size, 256 * world_size, 1, way.zero_stage, **way.train).model.vit()
    found = largest_micro_batch(
        config,
        global_batch_size=256 * world_size,
        world_sizes=[world_size],
        zero_stage=way.zero_stage,
        optimizer="adamw",
        precision="bf16",
        checkpointing=bool(way.train.get("activation_checkpointing")),
        memory_gib=gib,
    )
    if found is None:
        raise RuntimeError(f"the planner says that not one image of {variant} fits into {gib:.0f} GiB")
    return found


def judged(variant: str, world_size: int, way: Way, spec: Any, found: dict[str, Any]) -> dict[str, Any]:
    """What was measured, beside what the planner says."""
    config, micro_batch = spec.model.vit(), spec.train.micro_batch_size
    images_per_s = micro_batch * world_size / found["step_s"]
    planned = (
        state_bytes(config, way.zero_stage, world_size, "adamw") / GIB
        + activation_bytes(config, micro_batch, "bf16", spec.train.activation_checkpointing) / GIB
    )
    peak, peak_of_device = found["peak_gib"], found["peak_flops"]
    flops_per_s = images_per_s / world_size * train_flops_per_image(config)
    run = {
        "variant": variant,
        "way": way.name,
        "zero_stage": built_stage(way.zero_stage, world_size) if way.is_ours else None,
        "train": way.train,
        "micro_batch_size": micro_batch,
        "images_per_s": images_per_s,
        "step_s": found["step_s"],
        "mfu": None if peak_of_device is None else flops_per_s / peak_of_device,
        "peak_gib": peak,
        "planned_gib": planned,
        "planned_with_context_gib": planned + FIXED_GIB,
        "build_s": found["build_s"],
        "first_steps_s": found["first_steps_s"],
        "host_waits_per_step": found["host_waits_per_step"],
        "passed": peak is None or not way.is_ours or peak <= planned * (1 + MEMORY_BAND),
    }
    say(f"models: {variant}, {way.name}: {_told(run)}")
    return run


def train_in_every_way(ranks: Ranks, variant: str, planned: list[tuple[Way, Any]], steps: int) -> list[dict[str, Any]]:
    """`train_ours` or `train_bare` for each; what one leaves behind is given back before the next."""
    found = []
    for way, spec in planned:
        if ranks.is_first:
            say(f"models: {variant}, {way.name}")
        held = torch.cuda.memory_allocated() if ranks.device.type == "cuda" else 0
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        measured = (train_ours if way.is_ours else train_bare)(ranks, spec, steps, way)
        if measured["peak_gib"] is not None:
            measured["peak_gib"] -= held / GIB
        found.append(measured)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return found


def train_ours(ranks: Ranks, spec: Any, steps: int, _way: Way) -> dict[str, Any]:
    """The loop's own calls on images that lie on the device: seconds per step, peak memory, waits of the host."""
    began = time.perf_counter()
    micro_batch = spec.train.micro_batch_size
    accumulate = spec.train.global_batch_size // (micro_batch * ranks.world_size)
    model = vit.build(spec.model.vit())
    model.set_activation_checkpointing(spec.train.activation_checkpointing)
    engine = build_engine(model, spec, ranks, micro_batch)
    images, labels = _batch(ranks, spec)

    def step(number: int) -> None:
        for a in range(accumulate):
            seed_micro_step(0, number, a)
            engine.backward(classification_loss(engine.forward(images), labels, "softmax", 0.0))
        engine.step(1e-4)

    return _measured(ranks, step, steps, began)


def train_bare(ranks: Ranks, spec: Any, steps: int, way: Way) -> dict[str, Any]:
    """The least that torch can do with the same batch: autocast, fused AdamW, DDP where there are several ranks."""
    began = time.perf_counter()
    assert spec.train.global_batch_size == spec.train.micro_batch_size * ranks.world_size
    device = ranks.device
    with device:
        model = _timm(spec) if way == TIMM else vit.build(spec.model.vit())
    model.to(device)
    optimizer = AdamW(param_groups(model, WEIGHT_DECAY), lr=1e-4, fused=device.type == "cuda")
    if way == BARE_COMPILED:
        model.compile()
    network = DistributedDataParallel(model) if ranks.world_size > 1 else model
    images, labels = _batch(ranks, spec)

    def step(_number: int) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return _measured(ranks, step, steps, began)


def _timm(spec: Any) -> nn.Module:
    import timm

    sizes = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge"}
    letter, _, patch = spec.model.variant.partition("/")
    made: nn.Module = timm.create_model(
        f"vit_{sizes[letter]}_patch{patch}_224", img_size=spec.model.vit().image_size, num_classes=1000
    )
    return made


def _batch(ranks: Ranks, spec: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(ranks.rank)
    micro_batch = spec.train.micro_batch_size
    images = torch.randn(micro_batch, 3, *spec.model.vit().image_size, generator=generator).to(ranks.device)
    return images, torch.randint(0, 1000, (micro_batch,), generator=generator).to(ranks.device)


def _measured(ranks: Ranks, step: Callable[[int], None], steps: int, began: float) -> dict[str, Any]:
    built = time.perf_counter()
    for number in range(WARMUP_STEPS):
        step(number)
    synchronise(ranks)
    warm = time.perf_counter()
    times = []
    for number in range(WARMUP_STEPS, WARMUP_STEPS + steps):
        started = time.perf_counter()
        step(number)
        synchronise(ranks)
        times.append(time.perf_counter() - started)
    is_gpu = ranks.device.type == "cuda"
    return {
        "build_s": built - began,
        "first_steps_s": warm - built,
        "step_s": statistics.median(times),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if is_gpu else None,
        "host_waits_per_step": _host_waits(step, WARMUP_STEPS + steps) if is_gpu else None,
        "peak_flops": peak_flops(ranks.device, "bf16") if is_gpu else None,
    }


def _host_waits(step: Callable[[int], None], number: int) -> dict[str, int]:
    """Where the host waited for the device in one step, as file:line of the call, and how often."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(number)
    torch.cuda.set_sync_debug_mode("default")
    found: dict[str, int] = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            *_, package, file = warning.filename.split("/")
            where = f"{package}/{file}:{warning.lineno}"
            found[where] = found.get(where, 0) + 1
    return found
