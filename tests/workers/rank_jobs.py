"""What tests run on each rank, and how they look at what it left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from configs.states import Desired
from configs.wire import AttemptFile, Manifest
from tests.fakes.dir_store import DirStore
from tests.fakes.recording_reporter import RecordingReporter
from workers.attempt import RankOutcome, run_rank
from workers.checkpoint import read_manifest
from workers.distributed import Ranks
from workers.shards import Wanted, read_into


@dataclass(frozen=True)
class Run:
    """An attempt to run, with the orders each rank hears: {rank: (from step, order)}."""

    attempt: AttemptFile
    orders: dict[int, tuple[int, Desired]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    outcome: RankOutcome
    metrics: dict[str, dict[int, float]]
    events: list[tuple[str, str, dict[str, Any]]]
    checkpoints: list[str]
    phases: list[str]

    @property
    def losses(self) -> list[float]:
        return list(self.metrics["train/loss"].values())


def run_attempts(ranks: Ranks, runs: list[Run], root: str, make_store: Callable[..., Any] = DirStore) -> list[Result]:
    """Run attempts one after the other in one group. `make_store(root, ranks, reporter)` unless it is DirStore."""
    results = []
    for run in runs:
        order = run.orders.get(ranks.rank)
        reporter = RecordingReporter(
            lambda step, order=order: order[1] if order is not None and step >= order[0] else Desired.RUN
        )
        store = DirStore(root) if make_store is DirStore else make_store(root, ranks, reporter)
        outcome = run_rank(run.attempt, ranks, reporter, store, None)
        results.append(Result(outcome, reporter.metrics, reporter.events, reporter.checkpoints, list(reporter.phases)))
    return results


def read_state(store: DirStore, prefix: str) -> tuple[Manifest, dict[tuple[str, str], Tensor]]:
    """A checkpoint's manifest and all its tensors, weights and moments, whole, by (kind, name)."""
    manifest = read_manifest(store, prefix)
    kinds = {piece.kind for file in manifest.files for piece in file.slices}
    state = {
        (kind, name): torch.full(shape, float("nan"))
        for kind in sorted(kinds)
        for name, shape in manifest.tensors.items()
    }
    read_into(store, prefix, manifest, [Wanted(name, kind, 0, t.view(-1)) for (kind, name), t in state.items()])
    return manifest, state


def assert_same_bits(left: dict[Any, Tensor], right: dict[Any, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key].view(torch.int32), right[key].view(torch.int32))]
    assert not different
