"""Images per second of training, on two ranks of one thread each: our loop under DeepSpeed, against bare torch DDP with
the same model, and against timm's model and optimizer in the same bare script.

All train ViT-Ti/4 on Fashion-MNIST (28 px, one channel, 49 patches), global batch 128, AdamW, random flips. bf16 is
autocast over fp32 parameters; a processor without instructions for it emulates it, thirty times slower, so fp32 is
trained there. Ours is `workers.attempt.run_rank`: real loader, control word, metrics, skip of non-finite steps. The
opponents' images lie decoded in memory and are indexed and flipped as one tensor.

Timed, after some steps of warming up, is the wall clock from one step boundary to another, on rank 0, and the processor
time of both ranks, which says what a step costs also where other programs take the cores.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

import vit
from configs.data import TorchvisionSource
from configs.load import parse_spec
from configs.reasons import ExitReason
from configs.resolve import resolve
from configs.spec import PretrainJob
from configs.wire import AttemptFile, Phase
from tests.benchmarks.harness import Row, arguments, interleave, report
from tests.fakes.dir_store import DirStore
from tests.fakes.recording_reporter import RecordingReporter
from tests.ranks import run_ranks
from tests.workers.attempts import card_of, make_attempt
from vit.optim import param_groups
from workers.attempt import run_rank
from workers.data.loader import normalise
from workers.data.torchvision_sets import open_torchvision
from workers.distributed import Ranks

WORLD_SIZE = 2
GLOBAL_BATCH = 128
WARMUP_STEPS = 3
LR, WEIGHT_DECAY = 1e-3, 0.05
MEAN, STD = (0.2860,), (0.3530,)


DDP, TIMM = "torch DDP, the same model", "torch DDP, timm's model"
_FOLDER = object()
"""Stands for a folder of this run among a function's arguments."""
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Speed:
    """What one rank measured."""

    images_per_s: float
    """Of all ranks."""
    cpu_s: float
    """Processor seconds of this rank per image of the global batch."""
    loss: float
    """Of the last step, the mean over ranks; only rank 0 may know it."""


def job(stage: int, steps: int, precision: Precision) -> PretrainJob:
    """ViT-Ti/4 on Fashion-MNIST for so many steps, resolved."""
    spec = parse_spec(
        {
            "kind": "pretrain",
            "model": {"variant": "Ti/4", "image_size": 28, "in_channels": 1},
            "data": {
                "source": {"type": "torchvision", "name": "FashionMNIST", "download": "never"},
                "augment": {"crop": "resize", "flip": True},
                "mean": MEAN,
                "std": STD,
            },
            "optim": {"name": "adamw", "lr": LR, "weight_decay": WEIGHT_DECAY, "clip_grad_norm": None},
            "schedule": {"total_steps": steps, "warmup_steps": 0},
            "train": {
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": GLOBAL_BATCH // WORLD_SIZE,
                "precision": precision,
                "log_every_steps": 10,
            },
            "zero": {"stage": stage},
            "eval": {"at_end": False},
            "resources": {"workers": WORLD_SIZE, "gpus_per_worker": 0, "cpus_per_worker": 1},
        }
    )
    assert isinstance(spec, PretrainJob)
    return resolve(spec, card_of(spec), None)


class _Clock:
    """When each step began, in wall and processor time."""

    def __init__(self) -> None:
        self._began: dict[int, tuple[float, float]] = {}

    def note(self, step: int) -> None:
        self._began[step] = time.perf_counter(), time.process_time()

    def speed(self, last: int, loss: float) -> Speed:
        (wall, cpu), (first_wall, first_cpu) = self._began[last], self._began[WARMUP_STEPS]
        images = GLOBAL_BATCH * (last - WARMUP_STEPS)
        return Speed(images / (wall - first_wall), (cpu - first_cpu) / images, loss)


class _TimingReporter(RecordingReporter):
    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock

    def heartbeat(self, phase: Phase, step: int) -> None:
        super().heartbeat(phase, step)
        if phase == "training":
            self._clock.note(step)


def train_ours(ranks: Ranks, attempt: AttemptFile, data_root: Path | None, folder: str) -> Speed:
    """The speed of an attempt as workers run it."""
    clock = _Clock()
    reporter = _TimingReporter(clock)
    outcome = run_rank(attempt, ranks, reporter, DirStore(folder), data_root)
    if outcome.reason is not ExitReason.COMPLETED:
        raise RuntimeError(f"{outcome.reason}: {outcome.message}")
    losses = list(reporter.metrics["train/loss"].values()) if ranks.is_first else [float("nan")]
    return clock.speed(outcome.step, losses[-1])


def train_bare(ranks: Ranks, use_timm: bool, steps: int, precision: Precision, data_root: Path | None) -> Speed:
    """The speed of a minimal DDP script around our model, or timm's model and optimizer."""
    model, optimizer = _timm() if use_timm else _ours()
    network = DistributedDataParallel(model)
    source = open_torchvision(TorchvisionSource(type="torchvision", name="FashionMNIST"), "train", data_root, 1)
    everything = source.read_many(np.arange(len(source)))
    assert everything is not None
    labels = torch.from_numpy(source.labels)
    generator = torch.Generator().manual_seed(0)
    clock = _Clock()
    mean_loss = torch.zeros(())
    for step in range(steps):
        clock.note(step)
        chosen = torch.randint(len(labels), (GLOBAL_BATCH,), generator=generator).chunk(WORLD_SIZE)[ranks.rank]
        images = _flip(everything[chosen], torch.rand(len(chosen), generator=generator) < 0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(network(normalise(images, MEAN, STD)), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        mean_loss = loss.detach() / WORLD_SIZE
    clock.note(steps)
    dist.all_reduce(mean_loss)
    return clock.speed(steps, float(mean_loss))


def _ours() -> tuple[nn.Module, Optimizer]:
    model = vit.build(job(0, 1, "fp32").model.vit())
    return model, AdamW(param_groups(model, WEIGHT_DECAY), lr=LR)


def _timm() -> tuple[nn.Module, Optimizer]:
    import timm
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=4, in_chans=1, num_classes=10)
    return model, create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY)


def _flip(images: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def has_bf16() -> bool:
    """Whether this processor multiplies in bfloat16."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags


def main(argv: list[str]) -> int:
    parser = arguments(__doc__ or "", repetitions=5)
    parser.add_argument("--steps", type=int, default=15, help=f"of which {WARMUP_STEPS} are not timed")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if has_bf16() else "fp32")
    given = parser.parse_args(argv)
    speeds: dict[str, list[Speed]] = {}

    def run(name: str, function: Any, *rest: Any) -> float:
        with tempfile.TemporaryDirectory(prefix="pw-bench-") as folder:
            words = [folder if word is _FOLDER else word for word in rest]
            results: list[Speed] = run_ranks(WORLD_SIZE, function, *words, timeout_s=1800.0)
        speed = Speed(results[0].images_per_s, sum(r.cpu_s for r in results), results[0].loss)
        speeds.setdefault(name, []).append(speed)
        return speed.images_per_s

    def ours(stage: int) -> Callable[[], float]:
        attempt = make_attempt(job(stage, given.steps, given.precision), WORLD_SIZE)
        return partial(run, f"Patchwork, ZeRO {stage}", train_ours, attempt, given.data_root, _FOLDER)

    def bare(name: str, use_timm: bool) -> Callable[[], float]:
        return partial(run, name, train_bare, use_timm, given.steps, given.precision, given.data_root)

    contenders = {f"Patchwork, ZeRO {stage}": ours(stage) for stage in (1, 0)}
    contenders |= {DDP: bare(DDP, False), TIMM: bare(TIMM, True)}
    interleave(contenders, given.repetitions)
    rows = []
    for name in contenders:
        opponent = None if name == DDP else DDP
        is_ours = name.startswith("Patchwork")
        rows.append(
            Row(
                name,
                "images/s",
                [s.images_per_s for s in speeds[name]],
                opponent,
                ("at least", 1.0) if is_ours else None,
            )
        )
    rows += [
        Row(name, "CPU ms/image", [1e3 * s.cpu_s for s in speeds[name]], None if name == DDP else DDP)
        for name in contenders
    ]
    notes = {"steps": given.steps, "last_loss": {name: [s.loss for s in of] for name, of in speeds.items()}}
    title = f"Training, ViT-Ti/4 at 28 px, batch 128, {given.precision}, two ranks of one thread"
    report("train_throughput", title, rows, given.out, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
