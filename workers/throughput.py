"""How fast training goes: images per second, model FLOP/s utilisation, time spent waiting for data."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import torch

from configs.cost import GIB, GPUS, Precision
from configs.layout import rank_stream
from workers.distributed import Ranks
from workers.report import Reporter

_PROBE_SIDE = 512
_PROBE_S = 0.05


class Throughput:
    """Adds up the steps since the last report; evaluation and saving are not in it."""

    def __init__(
        self,
        reporter: Reporter,
        ranks: Ranks,
        images_per_step: int,
        flops_per_image: float | None,
        peak_flops: float | None,
        peak_memory: Callable[[], int] | None = None,
    ) -> None:
        """`images_per_step` is the global batch; `flops_per_image` a training step's (6 x MAC); `peak_flops` one
        device's per second. Without both of the latter, perf/mfu is not reported. `peak_memory` tells the most bytes
        that this rank's device has held, without waiting for it."""
        self._reporter = reporter
        self._ranks = ranks
        self._images_per_step = images_per_step
        self._share_of_peak = flops_per_image / peak_flops if flops_per_image and peak_flops else None
        self._peak_memory = peak_memory
        self._steps = 0
        self._seconds = 0.0
        self._waited_s = 0.0

    def add(self, seconds: float, waited_s: float) -> None:
        """Count one step, which took so long and waited so long for its data."""
        self._steps += 1
        self._seconds += seconds
        self._waited_s += waited_s

    def report(self, step: int) -> None:
        """Report the mean over the steps since the last report: this rank's step time, and from rank 0 the rest."""
        seconds = max(self._seconds, 1e-9)
        self._reporter.metric(f"perf/step_time_s/{rank_stream(self._ranks.rank)}", step, seconds / max(self._steps, 1))
        if self._peak_memory is not None:
            stream = rank_stream(self._ranks.rank)
            self._reporter.metric(f"perf/peak_memory_gib/{stream}", step, self._peak_memory() / GIB)
        if self._ranks.is_first:
            images_per_s = self._images_per_step * self._steps / seconds
            self._reporter.metric("perf/images_per_s", step, images_per_s)
            self._reporter.metric("perf/data_wait", step, min(self._waited_s / seconds, 1.0))
            if self._share_of_peak is not None:
                self._reporter.metric("perf/mfu", step, images_per_s * self._share_of_peak / self._ranks.world_size)
        self._steps, self._seconds, self._waited_s = 0, 0.0, 0.0


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """FLOP/s of one device: a GPU's from its data sheet (None if we have none), a CPU's measured."""
    if device.type == "cpu":
        return measured_peak_flops()
    words = re.split(r"[^A-Za-z0-9]", torch.cuda.get_device_name(device))
    gpu = next((gpu for name, gpu in GPUS.items() if name in words), None)
    tflops = None if gpu is None else gpu.peak_tflops(precision)
    return None if tflops is None else tflops * 1e12


def measured_peak_flops() -> float:
    """FLOP/s of the best fp32 matrix product within 50 ms on this rank's CPU threads: what MFU is a share of where no
    data sheet has the number."""
    a = torch.randn(_PROBE_SIDE, _PROBE_SIDE)
    best, until = float("inf"), time.perf_counter() + _PROBE_S
    while (started := time.perf_counter()) < until or best == float("inf"):
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return 2.0 * _PROBE_SIDE**3 / best
