"""`make gpu-check`: what can only be known on a GPU, measured and put into one JSON file.

    parity    losses of ZeRO 0 to 3, fp32 and bf16, against each other and against this machine's CPU
    resume    cut off half-way and resumed, at every stage: the same bits
    nccl      bus bandwidth of an all-reduce (two GPUs or more)
    saves     how long a save holds the step, in plain copies to page-locked memory
    models    B/16, L/16 and H/14 in bf16: images per second, MFU, peak memory and waits of the host, against what the
              planner says and against a bare torch loop
    jobs      pre-train, kill, recover, fine-tune, evaluate, look into, export and fetch, through the whole stack

It says what it found and whether each promise holds; exit status 1 if one does not. `--device cpu` goes the same way
with gloo, for a small model, to test this program; memory and MFU then have no meaning and are null.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.gpu.models import check_models
from tests.gpu.numerics import check_parity, check_resume
from tests.gpu.processes import on_ranks, say, synchronise
from tests.gpu.saves import check_saves
from workers.distributed import Ranks
from workers.versions import versions

NCCL_BYTES = 256 * 1024**2
CHECKS = ("parity", "resume", "nccl", "saves", "models", "jobs")


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
        synchronise(ranks)
        started = time.perf_counter()
        dist.all_reduce(data)
        synchronise(ranks)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def check_jobs(world_size: int, device: str) -> dict[str, Any]:
    """Imported when it is wanted: the other checks do without Ray and the control plane."""
    from tests.gpu import jobs

    return jobs.check_jobs(world_size, device)


def check_all(
    only: list[str], device: str, world_size: int, variants: list[str], steps: int, has_compiled: bool
) -> dict[str, Any]:
    """The checks of these names; one that fails with an error is in the result as such, and the others go on."""
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "parity": lambda: check_parity(world_size, device),
        "resume": lambda: check_resume(world_size, device),
        "nccl": lambda: check_nccl(world_size, device),
        "saves": lambda: check_saves(world_size, device),
        "models": lambda: check_models(variants, world_size, device, steps, has_compiled),
        "jobs": lambda: check_jobs(world_size, device),
    }
    found: dict[str, Any] = {}
    for name in only:
        say(name)
        try:
            found[name] = checks[name]()
        except Exception:  # noqa: BLE001 - it is in the result, and makes the run fail
            found[name] = {"error": traceback.format_exc(), "passed": False}
            say(found[name]["error"])
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
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="default: all of them")
    parser.add_argument("--models", default="B/16,L/16,H/14")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes a while")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per model")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        say("There is no GPU that torch can use here. --device cpu tests this program itself.")
        return 2
    world_size = options.gpus or (torch.cuda.device_count() if options.device == "cuda" else 2)
    variants, has_compiled = options.models.split(","), not options.no_compile
    result = check_all(options.only, options.device, world_size, variants, options.steps, has_compiled)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    say(f"{'all passed' if result['passed'] else 'FAILED'}; written to {options.out}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
