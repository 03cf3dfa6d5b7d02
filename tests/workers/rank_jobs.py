"""What tests run on each rank, and how they look at what it left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vit
from configs.spec import TrainingJob
from configs.states import Desired
from configs.wire import AttemptFile, Manifest, Preprocess
from tests.fakes.dir_store import DirStore
from tests.fakes.recording_reporter import RecordingReporter
from tests.workers.attempts import make_attempt
from workers.attempt import RankOutcome, run_rank
from workers.checkpoint import Checkpointer, CheckpointFacts, Progress, read_manifest
from workers.data.loader import TrainLoader
from workers.data.open import open_data
from workers.distributed import Ranks
from workers.engine import DeepSpeedEngine, Engine, build_engine
from workers.loop import train
from workers.shards import Wanted, read_into
from workers.throughput import Throughput


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


def run_attempts(
    ranks: Ranks, runs: list[Run], root: str, make_store: Callable[..., Any] = DirStore, data_root: str | None = None
) -> list[Result]:
    """Run attempts one after the other in one group. `make_store(root, ranks, reporter)` unless it is DirStore."""
    results = []
    for run in runs:
        order = run.orders.get(ranks.rank)
        reporter = RecordingReporter(
            lambda step, order=order: order[1] if order is not None and step >= order[0] else Desired.RUN
        )
        store = DirStore(root) if make_store is DirStore else make_store(root, ranks, reporter)
        outcome = run_rank(run.attempt, ranks, reporter, store, None if data_root is None else Path(data_root))
        results.append(Result(outcome, reporter.metrics, reporter.events, reporter.checkpoints, list(reporter.phases)))
    return results


def train_directly(
    ranks: Ranks,
    spec: TrainingJob,
    number: int,
    store: DirStore,
    reporter: RecordingReporter,
    wrap: Callable[[DeepSpeedEngine], Engine] = lambda engine: engine,
    **checkpointing: Any,
) -> tuple[RankOutcome, DeepSpeedEngine]:
    """`train` on parts put together by hand: its outcome, and the engine as it was left. `wrap` may put something
    before the engine; `checkpointing` goes to the Checkpointer."""
    attempt = make_attempt(spec, ranks.world_size, number)
    config, micro_batch_size = spec.model.vit(), spec.train.micro_batch_size
    assert attempt.dataset is not None
    assert isinstance(micro_batch_size, int)
    opened = open_data(spec.data, attempt.dataset, None, store.get, in_channels=config.in_channels)
    assert opened.train is not None
    engine = build_engine(vit.build(config, seed=spec.train.seed), spec, ranks, micro_batch_size)
    facts = checkpoint_facts(attempt, spec)
    checkpointer = Checkpointer(store, engine, ranks, facts, reporter, spec.checkpoint.every_steps, **checkpointing)
    loader = TrainLoader(
        opened.train,
        spec.data,
        config.image_size,
        seed=spec.train.seed,
        global_batch_size=spec.train.global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    throughput = Throughput(reporter, ranks, spec.train.global_batch_size, None, None)
    with loader:
        outcome = train(spec, wrap(engine), loader, lambda _: {}, checkpointer, throughput, ranks, reporter, Progress())
    checkpointer.close()
    return outcome, engine


def checkpoint_facts(attempt: AttemptFile, spec: TrainingJob) -> CheckpointFacts:
    """What the checkpoints of an attempt say of it."""
    config = spec.model.vit()
    assert attempt.dataset is not None
    assert spec.schedule.total_steps is not None
    return CheckpointFacts(
        job_id=attempt.job_id,
        attempt=attempt.number,
        parent=None,
        total_steps=spec.schedule.total_steps,
        global_batch_size=spec.train.global_batch_size,
        optimizer=spec.optim.name,
        spec_hash=attempt.spec_hash,
        training_fingerprint=attempt.training_fingerprint,
        data_fingerprint=attempt.dataset.fingerprint,
        model=config,
        preprocess=Preprocess(image_size=config.image_size, in_channels=config.in_channels, mean=(0.5,), std=(0.5,)),
    )


def read_state(store: DirStore, prefix: str) -> tuple[Manifest, dict[tuple[str, str], Tensor]]:
    """A checkpoint's manifest and all its tensors, weights and moments, whole, by (kind, name)."""
    manifest = read_manifest(store, prefix)
    held = {(piece.kind, piece.name) for file in manifest.files for piece in file.slices}
    state = {(kind, name): torch.full(manifest.tensors[name], float("nan")) for kind, name in sorted(held)}
    read_into(store, prefix, manifest, [Wanted(name, kind, 0, t.view(-1)) for (kind, name), t in state.items()])
    return manifest, state


def assert_same_bits(left: dict[Any, Tensor], right: dict[Any, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key].view(torch.int32), right[key].view(torch.int32))]
    assert not different
