"""What finished jobs measured, in the place of assumptions: rates and peaks of memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from configs.base import Stored
from configs.cost import Precision
from configs.rates import RECOMPUTED

MAX_DATA_WAIT = 0.3
"""A run that waited longer for its data says how fast the loader is, not the workers."""
NEAR = 4.0
"""Models of up to so many times the work per image, or so much less, tell of each other."""
BAND_SAME_PCT, BAND_NEAR_PCT = 15, 30
"""Error bands of a rate that one model, or one near it, was measured at; more if the runs differ by more."""


class MeasuredRun(Stored):
    """A finished training job, as far as plans learn from it."""

    job_id: str
    accelerator: str | None
    """None: on CPU."""
    precision: Precision
    macs: int
    """Multiply-accumulates of one image, forward."""
    checkpointing: bool
    cpus_per_worker: int
    world_size: int
    images_per_s: float
    """From the first step to the last, with evaluations and saves in between."""
    data_wait: float | None = None
    """Share of a step that was spent waiting for data."""
    peak_gib: float | None = None
    """The most memory a rank's GPU held."""
    planned_gib: float | None = None


@dataclass(frozen=True)
class MeasuredRate:
    """Useful FLOP/s of one worker without activation checkpointing."""

    flops_per_s: float
    band_pct: int
    num_runs: int
    is_same_model: bool


@dataclass(frozen=True)
class MeasuredMemory:
    """The largest of measured peak to planned memory."""

    ratio: float
    num_runs: int


class Calibration:
    """What a plan asks of the runs there are."""

    def __init__(self, runs: Iterable[MeasuredRun] = ()) -> None:
        self.runs = tuple(runs)

    def rate(
        self, accelerator: str | None, precision: Precision, macs: int, cpus_per_worker: int
    ) -> MeasuredRate | None:
        """The median of runs of the same model on the same hardware, else of models near it; None if there are none."""
        alike = [
            run
            for run in self.runs
            if (run.accelerator, run.precision) == (accelerator, precision)
            # On CPU the cores are the hardware.
            and (accelerator is not None or run.cpus_per_worker == cpus_per_worker)
            and (run.data_wait is None or run.data_wait <= MAX_DATA_WAIT)
        ]
        same = [run for run in alike if run.macs == macs]
        if same:
            return _rate(same, BAND_SAME_PCT, is_same_model=True)
        near = [run for run in alike if macs / NEAR <= run.macs <= macs * NEAR]
        return _rate(near, BAND_NEAR_PCT, is_same_model=False) if near else None

    def memory(self, accelerator: str | None) -> MeasuredMemory | None:
        """How far peaks lay from plans on this GPU, by the worst run; None if none was measured."""
        ratios = [
            run.peak_gib / run.planned_gib
            for run in self.runs
            if run.accelerator == accelerator is not None and run.peak_gib and run.planned_gib
        ]
        return MeasuredMemory(max(ratios), len(ratios)) if ratios else None


def _rate(runs: Sequence[MeasuredRun], band_pct: int, *, is_same_model: bool) -> MeasuredRate:
    rates = [
        6.0 * run.macs * run.images_per_s / run.world_size * (RECOMPUTED if run.checkpointing else 1.0) for run in runs
    ]
    middle = median(rates)
    spread = max(max(rates) / middle - 1.0, 1.0 - min(rates) / middle)
    return MeasuredRate(middle, max(band_pct, round(100 * spread)), len(runs), is_same_model)
