"""`make gpu-check`: what can only be known on a GPU, measured and put into one JSON file.

    parity    losses of ZeRO 0 to 3, fp32 and bf16, against each other and against this machine's CPU
    resume    cut off half-way and resumed, at every stage: the same bits
    syncs     how often a step makes the host wait for the device
    nccl      bus bandwidth of an all-reduce (two GPUs or more)
    models    B/16, L/16 and H/14 in bf16: images per second, MFU and peak memory, against what the planner says

It says what it found and whether each promise holds; exit status 1 if one does not. `--device cpu` goes the same way
with gloo, for a small model, to test this program; memory and MFU then have no meaning and are null.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import socket
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import vit
from configs.cost import FIXED_GIB, GIB, activation_bytes, largest_micro_batch, state_bytes, train_flops_per_image
from configs.datasets import card_for
from configs.load import parse_spec
from configs.reasons import ExitReason
from configs.resolve import resolve
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Run, read_state, run_attempts
from vit.losses import classification_loss
from workers.distributed import Ranks, init_ranks, leave_ranks
from workers.engine import build_engine
from workers.randomness import seed_micro_step
from workers.throughput import peak_flops
from workers.versions import versions

STAGES = (0, 1, 2, 3)
FP32_TOLERANCE = 2e-4
BF16_TOLERANCE = 3e-2
MEMORY_BAND = 0.15
"""How far the measured peak may lie above what the planner says."""
NCCL_BYTES = 256 * 1024**2


# -- processes -------------------------------------------------------------------------------------------------------
def on_ranks(world_size: int, device: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(ranks, *arguments)` in new processes, one for each device; results by rank.

    Raises:
        RuntimeError, RankFailed: a rank failed; the text is its traceback.
    """
    if device == "cpu":
        return run_ranks(world_size, function, *arguments)
    return spawn_ranks(world_size, device, function, *arguments)


def spawn_ranks(world_size: int, device: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """As `on_ranks`, in processes that share nothing with this one: CUDA does not survive a fork."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(results, rank, world_size, device, port, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world_size:
            if results.empty():
                if any(process.exitcode for process in processes):
                    raise RuntimeError(f"a rank died with exit code {[p.exitcode for p in processes]}")
                time.sleep(0.05)
                continue
            rank, result, error = results.get()
            if error:
                raise RuntimeError(f"rank {rank}:\n{error}")
            found[rank] = result
    finally:
        for process in processes:
            if len(found) < world_size:
                process.kill()
            process.join()
    return [found[rank] for rank in range(world_size)]


def _rank(
    results: Any, rank: int, world_size: int, device: str, port: int, function: Callable[..., Any], arguments: Any
) -> None:
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        where = f"cuda:{rank}" if device == "cuda" else "cpu"
        ranks = init_ranks(rank, world_size, f"tcp://127.0.0.1:{port}", where, rank)
        result = function(ranks, *arguments)
        leave_ranks()
        results.put((rank, result, ""))
    except Exception:  # noqa: BLE001 - the parent raises it
        results.put((rank, None, traceback.format_exc()))


# -- parity and resume -----------------------------------------------------------------------------------------------
def check_parity(world_size: int, device: str) -> dict[str, Any]:
    """Losses of six steps with dropout off, whose masks differ between devices."""
    found: dict[str, Any] = {"max_difference": {}, "tolerance": {"fp32": FP32_TOLERANCE, "bf16": BF16_TOLERANCE}}
    passed = True
    for precision, tolerance in (("fp32", FP32_TOLERANCE), ("bf16", BF16_TOLERANCE)):
        parts = {"model": {"dropout": 0.0, "drop_path": 0.0}, "train": {"precision": precision}}
        specs = [tiny_spec(zero={"stage": stage}, **parts) for stage in STAGES]
        runs = [Run(make_attempt(spec, world_size, number)) for number, spec in enumerate(specs, 1)]
        losses = _losses(on_ranks(world_size, device, run_attempts, runs, tempfile.mkdtemp())[0])
        (on_cpu,) = _losses(on_ranks(1, "cpu", run_attempts, [Run(make_attempt(specs[0], 1))], tempfile.mkdtemp())[0])
        for stage, of_stage in zip(STAGES, losses, strict=True):
            difference = max(abs(a - b) for a, b in zip(of_stage, on_cpu, strict=True))
            found["max_difference"][f"{precision}/zero{stage}"] = difference
            passed &= difference <= tolerance
    return found | {"passed": passed}


def _losses(results: list[Any]) -> list[list[float]]:
    failed = [result.outcome for result in results if result.outcome.reason is not ExitReason.COMPLETED]
    if failed:
        raise RuntimeError(f"a run did not complete: {failed[0]}")
    return [result.losses for result in results]


def check_resume(world_size: int, device: str) -> dict[str, Any]:
    """Whole, and again from its third step: weights and moments bit for bit."""
    root = tempfile.mkdtemp()
    exact: dict[str, bool] = {}
    for stage in STAGES:
        spec = tiny_spec(zero={"stage": stage}, checkpoint={"every_steps": 3}, train={"precision": "bf16"})
        first, second = 2 * stage + 1, 2 * stage + 2
        resumed = make_attempt(spec, world_size, second, resume_from=saved_at(3, first))
        runs = [Run(make_attempt(spec, world_size, first)), Run(resumed)]
        _losses(on_ranks(world_size, device, deterministic, runs, root)[0])
        (_, whole), (_, again) = (read_state(DirStore(root), saved_at(6, number).prefix) for number in (first, second))
        exact[f"zero{stage}"] = all(torch.equal(whole[key], again[key]) for key in whole)
    return {"exact": exact, "passed": all(exact.values())}


def deterministic(ranks: Ranks, runs: list[Run], root: str) -> list[Any]:
    """`run_attempts` with kernels whose sums have one order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    return run_attempts(ranks, runs, root)


# -- NCCL ------------------------------------------------------------------------------------------------------------
def check_nccl(world_size: int, device: str) -> dict[str, Any]:
    """GB/s that each rank sends in an all-reduce of 256 MiB: 2 (n - 1) / n of its bytes (NCCL's bus bandwidth)."""
    if world_size < 2:
        return {"bus_gb_per_s": None, "note": "one device", "passed": True}
    seconds = on_ranks(world_size, device, time_all_reduce)[0]
    return {"bus_gb_per_s": 2 * (world_size - 1) / world_size * NCCL_BYTES / seconds / 1e9, "passed": True}


def time_all_reduce(ranks: Ranks) -> float:
    """Median seconds."""
    data = torch.ones(NCCL_BYTES // 4, device=ranks.device)
    times = []
    for _ in range(12):
        _synchronise(ranks)
        started = time.perf_counter()
        dist.all_reduce(data)
        _synchronise(ranks)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def _synchronise(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


# -- models ----------------------------------------------------------------------------------------------------------
def model_spec(variant: str, image_size: int, batch: int, micro_batch: int, stage: int, **train: Any) -> Any:
    """A resolved pre-training job on generated images."""
    raw = {
        "kind": "pretrain",
        "model": {"variant": variant, "image_size": image_size, "num_classes": 1000},
        "data": {"source": {"type": "synthetic", "num_classes": 1000, "image_size": image_size}},
        "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        "schedule": {"total_steps": 100},
        "train": {"global_batch_size": batch, "micro_batch_size": micro_batch, "precision": "bf16"} | train,
        "zero": {"stage": stage},
        "resources": {"workers": 1, "gpus_per_worker": 0},
    }
    spec = parse_spec(raw)
    return resolve(spec, card_for(spec.data.source, {}), None)


def planned_micro_batch(variant: str, image_size: int, stage: int, world_size: int, gib: float, **train: Any) -> int:
    """The largest power of two up to 256 that the planner lets fit."""
    config = model_spec(variant, image_size, 256 * world_size, 1, stage, **train).model.vit()
    found = largest_micro_batch(
        config,
        global_batch_size=256 * world_size,
        world_sizes=[world_size],
        zero_stage=stage,
        optimizer="adamw",
        precision="bf16",
        checkpointing=bool(train.get("activation_checkpointing")),
        memory_gib=gib,
    )
    if found is None:
        raise RuntimeError(f"the planner says that not one image of {variant} fits into {gib:.0f} GiB")
    return found


def train_steps(ranks: Ranks, spec: Any, steps: int) -> dict[str, Any]:
    """The loop's own calls on images that lie on the device: seconds per step, peak memory, waits of the host."""
    micro_batch = spec.train.micro_batch_size
    accumulate = spec.train.global_batch_size // (micro_batch * ranks.world_size)
    model = vit.build(spec.model.vit())
    model.set_activation_checkpointing(spec.train.activation_checkpointing)
    engine = build_engine(model, spec, ranks, micro_batch)
    generator = torch.Generator().manual_seed(ranks.rank)
    images = torch.randn(micro_batch, 3, *spec.model.vit().image_size, generator=generator).to(ranks.device)
    labels = torch.randint(0, 1000, (micro_batch,), generator=generator).to(ranks.device)

    def step(number: int) -> None:
        for a in range(accumulate):
            seed_micro_step(0, number, a)
            engine.backward(classification_loss(engine.forward(images), labels, "softmax", 0.0))
        engine.step(1e-4)

    for number in range(3):
        step(number)
    _synchronise(ranks)
    times = []
    for number in range(3, 3 + steps):
        started = time.perf_counter()
        step(number)
        _synchronise(ranks)
        times.append(time.perf_counter() - started)
    is_gpu = ranks.device.type == "cuda"
    return {
        "step_s": statistics.median(times),
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if is_gpu else None,
        "host_waits_per_step": _host_waits(step, 3 + steps) if is_gpu else None,
        "peak_flops": peak_flops(ranks.device, "bf16") if is_gpu else None,
    }


def _host_waits(step: Callable[[int], None], number: int) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(number)
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def check_model(
    variant: str, image_size: int, world_size: int, device: str, stage: int, steps: int, gib: float, **train: Any
) -> dict[str, Any]:
    """One model at one stage, with the micro-batch that the planner says fits."""
    micro_batch = planned_micro_batch(variant, image_size, stage, world_size, gib, **train) if device == "cuda" else 2
    spec = model_spec(variant, image_size, micro_batch * world_size, micro_batch, stage, **train)
    found = on_ranks(world_size, device, train_steps, spec, steps)[0]
    config = spec.model.vit()
    images_per_s = micro_batch * world_size / found["step_s"]
    planned = (
        state_bytes(config, stage, world_size, "adamw") / GIB
        + activation_bytes(config, micro_batch, "bf16", spec.train.activation_checkpointing) / GIB
    )
    peak = found["peak_gib"]
    return {
        "variant": variant,
        "zero_stage": stage,
        "train": train,
        "micro_batch_size": micro_batch,
        "images_per_s": images_per_s,
        "step_s": found["step_s"],
        "mfu": None
        if found["peak_flops"] is None
        else images_per_s / world_size * train_flops_per_image(config) / found["peak_flops"],
        "peak_gib": peak,
        "planned_gib": planned,
        "planned_with_context_gib": planned + FIXED_GIB,
        "host_waits_per_step": found["host_waits_per_step"],
        "passed": peak is None or peak <= planned * (1 + MEMORY_BAND),
    }


def check_models(variants: list[str], world_size: int, device: str, steps: int) -> dict[str, Any]:
    gib = torch.cuda.get_device_properties(0).total_memory / GIB if device == "cuda" else 0.0
    image_size = 224 if device == "cuda" else 32
    ways: list[tuple[int, dict[str, Any]]] = [(1, {}), (1, {"activation_checkpointing": True}), (3, {})]
    if device == "cuda":
        ways.insert(1, (1, {"compile": True}))  # on a CPU that takes minutes, and tests/workers/test_compile.py does it
    runs = []
    for variant in variants:
        for stage, train in ways:
            say(f"models: {variant}, ZeRO {stage} {train or ''}")
            runs.append(check_model(variant, image_size, world_size, device, stage, steps, gib, **train))
    return {"runs": runs, "memory_band": MEMORY_BAND, "passed": all(run["passed"] for run in runs)}


# -- all of it -------------------------------------------------------------------------------------------------------
def say(text: str) -> None:
    print(f"[gpu-check] {text}", file=sys.stderr, flush=True)


def check_all(device: str, world_size: int, variants: list[str], steps: int) -> dict[str, Any]:
    """Everything; a check that fails with an error is in the result as such, and the others go on."""
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "parity": lambda: check_parity(world_size, device),
        "resume": lambda: check_resume(world_size, device),
        "nccl": lambda: check_nccl(world_size, device),
        "models": lambda: check_models(variants, world_size, device, steps),
    }
    found: dict[str, Any] = {}
    for name, check in checks.items():
        say(name)
        try:
            found[name] = check()
        except Exception:  # noqa: BLE001 - it is in the result, and makes the run fail
            found[name] = {"error": traceback.format_exc(), "passed": False}
        say(f"{name}: {'passed' if found[name]['passed'] else 'FAILED'}")
    return {
        "made_at": datetime.now(UTC).isoformat(),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or "cpu",
        "world_size": world_size,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "versions": versions(),
        "checks": found,
        "passed": all(check["passed"] for check in found.values()),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, default=None, help="how many; default: all")
    parser.add_argument("--models", default="B/16,L/16,H/14")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per model")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        say("There is no GPU that torch can use here. --device cpu tests this program itself.")
        return 2
    world_size = options.gpus or (torch.cuda.device_count() if options.device == "cuda" else 2)
    result = check_all(options.device, world_size, options.models.split(","), options.steps)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    say(f"{'all passed' if result['passed'] else 'FAILED'}; written to {options.out}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
