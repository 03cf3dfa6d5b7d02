"""How long a save holds the training step: our staging, against a plain copy of the same state, torch's
`distributed.checkpoint.async_save` and DeepSpeed's `save_checkpoint`.

The state is that of ViT-B/16 with Adam's moments in fp32, 1.03 GB, at ZeRO stage 1, on one rank and divided over two.
Everything is written to a folder; what goes on behind a step is waited for before the next measurement, and not timed.
With two ranks the slower one counts. The plain copy goes into buffers that were allocated and touched before, as ours
are: no save that gives the step back can be cheaper. Processor time says the same where others take the cores.
`make gpu-check` measures the same on GPUs, where the buffers are page-locked.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import vit
from configs.load import parse_spec
from configs.resolve import resolve
from configs.spec import PretrainJob
from tests.benchmarks.harness import Row, arguments, interleave, report
from tests.fakes.dir_store import DirStore
from tests.fakes.recording_reporter import RecordingReporter
from tests.ranks import run_ranks
from tests.workers.attempts import card_of, make_attempt
from tests.workers.rank_jobs import checkpoint_facts
from workers.checkpoint import Checkpointer, Progress
from workers.control import ControlWord
from workers.distributed import Ranks
from workers.engine import DeepSpeedEngine, build_engine
from workers.owned import moment, moment_names, owned

OURS, COPY, DCP, DEEPSPEED = "Patchwork", "plain copy", "torch async_save", "DeepSpeed save_checkpoint"


def job(world_size: int, variant: str) -> PretrainJob:
    spec = parse_spec(
        {
            "kind": "pretrain",
            "model": {"variant": variant, "image_size": 224},
            "data": {"source": {"type": "synthetic", "num_classes": 1000, "image_size": 224}},
            "schedule": {"total_steps": 1000},
            "train": {"global_batch_size": 2 * world_size, "micro_batch_size": 2, "precision": "fp32"},
            "zero": {"stage": 1},
            "resources": {"workers": world_size, "gpus_per_worker": 0},
        }
    )
    assert isinstance(spec, PretrainJob)
    return resolve(spec, card_of(spec), None)


class _Saves:
    """The contenders around one engine. Each call makes one save and returns the seconds it held this rank."""

    def __init__(self, ranks: Ranks, variant: str, folder: str) -> None:
        spec = job(ranks.world_size, variant)
        attempt = make_attempt(spec, ranks.world_size)
        self.engine = build_engine(vit.build(spec.model.vit()), spec, ranks, 2)
        self.folder = Path(folder)
        self.ranks = ranks
        self.control = ControlWord(ranks)
        facts = checkpoint_facts(attempt, spec)
        reporter = RecordingReporter()
        self.checkpointer = Checkpointer(DirStore(self.folder / "ours"), self.engine, ranks, facts, reporter, 1)
        self.state = _tensors(self.engine)
        pinned = ranks.device.type == "cuda"
        self.buffers = [torch.empty_like(tensor, device="cpu", pin_memory=pinned).zero_() for tensor in self.state]
        self.cpu_s: dict[str, list[float]] = {}
        self._number = 0

    def ours(self) -> float:
        self._number += 1
        stall = self._timed(OURS, lambda: self.checkpointer.maybe_save(Progress(self._number), {}, self.control))
        failure = self.checkpointer.drain(self.control)
        assert failure is None, self.checkpointer.failure_message
        return self._end("ours", stall)

    def copy(self) -> float:
        def copy() -> None:
            for tensor, buffer in zip(self.state, self.buffers, strict=True):
                buffer.copy_(tensor, non_blocking=True)

        return self._timed(COPY, copy)

    def dcp(self) -> float:
        named = {f"{self.ranks.rank}/{number}": tensor for number, tensor in enumerate(self.state)}
        written: list[Future] = []

        def begin() -> None:
            response = dcp.async_save(named, checkpoint_id=self.folder / "dcp", process_group=self.ranks.control_group)
            assert isinstance(response, Future)
            written.append(response)

        stall = self._timed(DCP, begin)
        written[0].result()
        return self._end("dcp", stall)

    def deepspeed(self) -> float:
        where = str(self.folder / "deepspeed")
        stall = self._timed(DEEPSPEED, lambda: self.engine.deepspeed.save_checkpoint(where, tag="bench"))
        return self._end("deepspeed", stall)

    def _timed(self, name: str, action: Callable[[], None]) -> float:
        _synchronise(self.ranks)
        dist.barrier(self.ranks.control_group)
        wall, cpu = time.perf_counter(), time.thread_time()
        action()
        _synchronise(self.ranks)
        taken = torch.tensor([time.perf_counter() - wall, time.thread_time() - cpu], dtype=torch.float64)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=self.ranks.control_group)
        self.cpu_s.setdefault(name, []).append(float(taken[1]))
        return float(taken[0])

    def _end(self, part: str, stall: float) -> float:
        dist.barrier(self.ranks.control_group)
        if self.ranks.is_first:
            shutil.rmtree(self.folder / part)
        dist.barrier(self.ranks.control_group)
        return stall


def _synchronise(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


def _tensors(engine: DeepSpeedEngine) -> list[Tensor]:
    """The whole tensors that hold what this rank saves."""
    flats = {id(run.flat): run.flat for run in owned(engine)}
    return [
        tensor
        for flat in flats.values()
        for tensor in (flat.detach(), *(moment(engine, flat, name) for name in moment_names(engine)))
    ]


def measure(
    ranks: Ranks, variant: str, folder: str, repetitions: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """Stalls and processor seconds of each contender, and the bytes of this rank's state."""
    saves = _Saves(ranks, variant, folder)
    contenders = {OURS: saves.ours, COPY: saves.copy, DCP: saves.dcp, DEEPSPEED: saves.deepspeed}
    interleave(contenders, 1, is_quiet=True)  # warms up: lazy imports, threads, first allocations
    saves.cpu_s.clear()
    stalls = interleave(contenders, repetitions, is_quiet=not ranks.is_first)
    saves.checkpointer.close()
    return stalls, saves.cpu_s, sum(t.numel() * t.element_size() for t in saves.state)


def main(argv: list[str]) -> int:
    parser = arguments(__doc__ or "", repetitions=5)
    parser.add_argument("--variant", default="B/16", help="the model, default B/16")
    given = parser.parse_args(argv)
    rows, notes = [], {}
    for world_size in (1, 2):
        with tempfile.TemporaryDirectory(prefix="pw-bench-") as folder:
            stalls, cpu_s, num_bytes = run_ranks(
                world_size, measure, given.variant, folder, given.repetitions, timeout_s=3600.0
            )[0]
        suffix = f", {world_size} rank{'s' if world_size > 1 else ''}"
        notes[f"bytes per rank{suffix}"] = num_bytes
        for name, values in stalls.items():
            opponent = None if name == COPY else COPY + suffix
            goal = ("at most", 1.3) if name == OURS else None
            rows.append(Row(name + suffix, "s", values, opponent, goal))
        rows += [
            Row(name + suffix, "CPU s", cpu_s[name], None if name == COPY else COPY + suffix) for name in (OURS, COPY)
        ]
    report(
        "save_stall", f"What a save holds up, ViT-{given.variant} with Adam's moments, ZeRO 1", rows, given.out, notes
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
