"""How long a save holds a step on a GPU: `tests/benchmarks/save_stall.py`, from the device to page-locked memory."""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

from tests.benchmarks.save_stall import COPY, OURS, measure
from tests.gpu.processes import on_ranks

STALL_BAND = 1.3
"""How many plain copies a save may take."""


def check_saves(world_size: int, device: str, repetitions: int = 5) -> dict[str, Any]:
    """Median seconds of each contender, and ours in plain copies of the same repetition."""
    variant = "B/16" if device == "cuda" else "Ti/16"
    with tempfile.TemporaryDirectory(prefix="pw-gpu-") as folder:
        stalls, _, num_bytes = on_ranks(world_size, device, measure, variant, folder, repetitions)[0]
    in_copies = statistics.median(ours / copy for ours, copy in zip(stalls[OURS], stalls[COPY], strict=True))
    return {
        "variant": variant,
        "bytes_per_rank": num_bytes,
        "stall_s": {name: statistics.median(values) for name, values in stalls.items()},
        "in_plain_copies": in_copies,
        # On a CPU this goes the way and no more: the copy is a small model's, and other programs share its cores.
        "passed": device == "cpu" or in_copies <= STALL_BAND,
    }
