"""One rank's part of an attempt: from the attempt file to an outcome.

The outcome is a value, also on failure. A rank that fails returns at once, without meeting its peers in another
collective: they may be waiting in one for it, and only the driver, which sees the first outcome that is no success,
ends them. Errors before the first collective are no different.
"""

from __future__ import annotations

import contextlib
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import structlog
import torch
from torch import Tensor

import vit
from configs.cost import train_flops_per_image
from configs.data import DataConfig
from configs.ids import parse_checkpoint_id
from configs.layout import report_key
from configs.lineage import batch_number, join_skips
from configs.model import NetworkConfig
from configs.probes import FewShot, Neighbours
from configs.reasons import ExitReason
from configs.resolve import load_resolved
from configs.spec import EvaluateJob, ExportJob, ImportJob, InspectJob, SearchJob, TrainingJob
from configs.states import Desired
from configs.wire import AttemptFile, CheckpointSource, EvaluationReport, ParentCut, Phase, Preprocess
from vit.transfer import resize_weights, transfer_weights
from workers.checkpoint import Checkpointer, CheckpointFacts, Progress, load, read_weights
from workers.control import LEAVES_WITH, ControlWord, Word
from workers.data.corrupt import CorruptImage, OnCorrupt
from workers.data.loader import EvalLoader, TrainLoader
from workers.data.open import OpenedData, open_data
from workers.distributed import Ranks
from workers.ema import WeightAverage
from workers.engine import DeepSpeedEngine, build_engine
from workers.evaluate import evaluate, evaluate_masked
from workers.export import export_weights
from workers.import_weights import import_weights
from workers.loop import Evaluate, train
from workers.outcome import JobError, RankOutcome, outcome_of
from workers.probe import MakeLoader
from workers.probe_data import Probe, open_probes, reads_own_training_split, run_probes
from workers.real_labels import read_real_labels
from workers.report import Reporter
from workers.store import ObjectStore
from workers.throughput import Throughput, peak_flops

__all__ = ["RankOutcome", "run_rank"]

log = structlog.get_logger(__name__)


def run_rank(
    attempt: AttemptFile, ranks: Ranks, reporter: Reporter, store: ObjectStore, data_root: Path | None
) -> RankOutcome:
    """Do this rank's part of an attempt, of a job of any kind. Never raises: failures are outcomes."""
    steps = _LastStep(reporter)
    try:
        spec = load_resolved(attempt.spec)
        if ranks.device.type == "cpu":
            # The number of threads decides the order of sums: the job's, not the node's, so that every node resumes it.
            torch.set_num_threads(spec.resources.cpus_per_worker)
        if isinstance(spec, EvaluateJob):
            return _evaluate(attempt, spec, ranks, steps, store, data_root)
        if isinstance(spec, InspectJob):
            return _inspect(attempt, spec, ranks, steps, store, data_root)
        if isinstance(spec, ExportJob):
            return _export(attempt, spec, ranks, steps, store)
        if isinstance(spec, ImportJob):
            return _import(attempt, spec, ranks, steps, store)
        assert not isinstance(spec, SearchJob), "a search has no ranks of its own, only trials"
        return _train(attempt, spec, ranks, steps, store, data_root)
    except Exception as error:  # noqa: BLE001 - the rank's top level
        outcome = outcome_of(error, steps.step)
        log.error("This rank failed.", reason=outcome.reason, step=outcome.step, error=traceback.format_exc())
        return outcome


def _train(
    attempt: AttemptFile,
    spec: TrainingJob,
    ranks: Ranks,
    reporter: Reporter,
    store: ObjectStore,
    data_root: Path | None,
) -> RankOutcome:
    reporter.heartbeat("building", 0)
    config, micro_batch_size = spec.model.network(), spec.train.micro_batch_size
    assert isinstance(micro_batch_size, int), "a resolved job names its micro-batch size"
    opened = _open(attempt, spec.data, config, store, data_root, eval_only=False)
    assert opened.train is not None
    engine = _build(attempt, spec, config, ranks, store, micro_batch_size)

    average = None if spec.train.ema_decay is None else WeightAverage(engine, spec.train.ema_decay)
    start = Progress()
    if attempt.resume_from is not None:
        reporter.heartbeat("loading", 0)
        fingerprint = attempt.resume_fingerprint or attempt.training_fingerprint
        start = load(engine, store, attempt.resume_from.prefix, fingerprint, average)
        if ranks.is_first:
            checkpoint_id = attempt.resume_from.checkpoint_id
            reporter.event("training.resumed", f"continues from step {start.step}", {"checkpoint_id": checkpoint_id})
    start = replace(start, skips=join_skips(start.skips, attempt.skips))
    skipped = batch_number(start.step, start.skips) - start.step
    if skipped and ranks.is_first:
        reporter.event("data.skipped", f"{skipped} global batches are passed over", {"step": start.step})

    probes = _open_probes(attempt, spec.eval.few_shot, None, opened, spec.data, config, store, data_root)
    measure = _measurer(spec, config, opened, probes, engine, average, ranks, reporter)
    facts = _facts(attempt, spec, config, opened)
    checkpointer = Checkpointer(store, engine, ranks, facts, reporter, spec.checkpoint.every_steps, average=average)
    throughput = Throughput(
        reporter,
        ranks,
        spec.train.global_batch_size,
        train_flops_per_image(config),
        peak_flops(ranks.device, spec.train.precision),
        # What the allocator has reserved is what must fit.
        partial(torch.cuda.max_memory_reserved, ranks.device) if ranks.device.type == "cuda" else None,
    )
    train_loader = TrainLoader(
        opened.train,
        spec.data,
        config.image_size,
        seed=spec.train.seed,
        global_batch_size=spec.train.global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=start.step,
        skips=start.skips,
        on_corrupt=_tell(reporter),
        pin_memory=ranks.device.type == "cuda",
    )
    with train_loader:
        try:
            return train(spec, engine, train_loader, measure, checkpointer, throughput, ranks, reporter, start, average)
        finally:
            checkpointer.close()


def _measurer(
    spec: TrainingJob,
    config: NetworkConfig,
    opened: OpenedData,
    probes: tuple[Probe, ...],
    engine: DeepSpeedEngine,
    average: WeightAverage | None,
    ranks: Ranks,
    reporter: Reporter,
) -> Evaluate:
    """How the loop evaluates the weights or their average: accuracy, and that of features where it is asked for."""
    make_loader = _eval_loaders(spec.data, config, spec.eval.batch_size, ranks, reporter)
    eval_loader = make_loader(opened.eval)

    def measure(keep_going: Callable[[], bool]) -> dict[str, float] | None:
        averaged: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if spec.eval.weights == "ema":
            assert average is not None, "the spec asks for train.ema_decay"
            averaged = average.in_place()
        with averaged, engine.evaluating():
            if spec.train.objective == "masked_patch":
                forward = partial(_forward_corrupted, engine)
                measured = evaluate_masked(forward, eval_loader, spec.data, spec.model.stride, ranks, keep_going)
            else:
                measured = evaluate(engine.forward, eval_loader, spec.data, spec.train.loss, ranks, keep_going)
            if measured is None:
                return None
            represent = partial(engine.forward, representation=True)
            probed = run_probes(represent, probes, make_loader, spec.data, ranks, keep_going)
            return None if probed is None else measured | probed

    return measure


def _forward_corrupted(engine: DeepSpeedEngine, images: Tensor, sources: Tensor) -> Tensor:
    return engine.forward(images, sources=sources)


def _eval_loaders(
    data: DataConfig, config: NetworkConfig, batch_size: int, ranks: Ranks, reporter: Reporter
) -> MakeLoader:
    """How this rank's share of a source is read for evaluation."""
    return partial(
        EvalLoader,
        data=data,
        image_hw=config.image_size,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        on_corrupt=_tell(reporter),
        pin_memory=ranks.device.type == "cuda",
    )


def _build(
    attempt: AttemptFile,
    spec: TrainingJob,
    config: NetworkConfig,
    ranks: Ranks,
    store: ObjectStore,
    micro_batch_size: int,
) -> DeepSpeedEngine:
    model = vit.build(config, seed=spec.train.seed)
    if spec.kind == "finetune" and attempt.resume_from is None and ranks.is_first:
        # Rank 0 alone reads the weights: the engine sends its model to all others.
        source = _source(attempt)
        state, manifest = read_weights(store, source.prefix, spec.weights)
        model.load_state_dict(model.state_dict() | _transferred(state, manifest.model, config, spec.keep_head))
    model.set_activation_checkpointing(spec.train.activation_checkpointing)
    return build_engine(model, spec, ranks, micro_batch_size)


def _transferred(
    state: dict[str, Tensor], source: NetworkConfig, target: NetworkConfig, keep_head: bool
) -> dict[str, Tensor]:
    try:
        return transfer_weights(state, source, target, keep_head)
    except ValueError as error:
        raise JobError(f"model: {error}") from error


def _evaluate(
    attempt: AttemptFile,
    spec: EvaluateJob,
    ranks: Ranks,
    reporter: Reporter,
    store: ObjectStore,
    data_root: Path | None,
) -> RankOutcome:
    reporter.heartbeat("loading", 0)
    source = _source(attempt)
    state, manifest = read_weights(store, source.prefix, spec.weights)
    config = manifest.model
    if spec.image_size is not None:
        config = config.model_copy(update={"image_size": (spec.image_size, spec.image_size)})
        try:
            state = resize_weights(state, manifest.model, config)
        except ValueError as error:
            raise JobError(f"image_size: {error}") from error
    assert spec.data is not None, "a resolved evaluation names its data"
    eval_only = not reads_own_training_split(spec.few_shot, spec.neighbours)
    opened = _open(attempt, spec.data, config, store, data_root, eval_only)
    probes = _open_probes(attempt, spec.few_shot, spec.neighbours, opened, spec.data, config, store, data_root)
    real_labels = None
    if spec.real_labels is not None:
        real_labels = read_real_labels(spec.real_labels, data_root, opened.eval, config.num_classes)
    model = vit.build(config)
    model.load_state_dict(state)
    model.to(ranks.device).eval()
    make_loader = _eval_loaders(spec.data, config, spec.batch_size, ranks, reporter)
    control, orders, num_batches = ControlWord(ranks), [Desired.RUN], 0

    def keep_going() -> bool:
        nonlocal num_batches
        num_batches += 1
        reporter.heartbeat("evaluating", num_batches)
        orders[0] = control.exchange(Word(reporter.desired())).order
        return orders[0] is Desired.RUN

    reporter.heartbeat("evaluating", 0)
    autocast = torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=spec.precision == "bf16")
    with torch.inference_mode(), autocast:
        metrics: dict[str, float] | None = {"eval/num_examples": float(len(opened.eval))}
        if config.has_classifier:
            batches = make_loader(opened.eval)
            metrics = evaluate(model, batches, spec.data, "softmax", ranks, keep_going, real_labels)
        if metrics is not None:
            represent = partial(model, representation=True)
            probed = run_probes(represent, probes, make_loader, spec.data, ranks, keep_going)
            metrics = None if probed is None else metrics | probed
    control.drain()
    if metrics is None:
        return RankOutcome(LEAVES_WITH[orders[0]], "", num_batches)
    if ranks.is_first:
        report = EvaluationReport(
            job_id=attempt.job_id,
            checkpoint_id=manifest.checkpoint_id,
            dataset="" if attempt.dataset is None else attempt.dataset.name,
            split=spec.data.eval if spec.data.holdout is None else f"{spec.data.train} (held out)",
            num_examples=int(metrics["eval/num_examples"]),
            metrics=metrics,
            created_at=datetime.now(UTC),
        )
        store.put(report_key(attempt.job_id), report.model_dump_json().encode())
        for name, value in metrics.items():
            reporter.metric(name, manifest.step, value)
    reporter.heartbeat("finishing", num_batches)
    return RankOutcome(ExitReason.COMPLETED, "", num_batches)


def _inspect(
    attempt: AttemptFile,
    spec: InspectJob,
    ranks: Ranks,
    reporter: Reporter,
    store: ObjectStore,
    data_root: Path | None,
) -> RankOutcome:
    # Here, not above: no other job should wait for matplotlib.
    from workers.inspection import inspect_checkpoint

    reporter.heartbeat("loading", 0)
    state, manifest = read_weights(store, _source(attempt).prefix, spec.weights)
    model = vit.build(manifest.model)
    model.load_state_dict(state)
    return inspect_checkpoint(
        attempt, spec, model, manifest, ranks, reporter, store, data_root, on_corrupt=_tell(reporter)
    )


def _export(attempt: AttemptFile, spec: ExportJob, ranks: Ranks, reporter: Reporter, store: ObjectStore) -> RankOutcome:
    if ranks.is_first:
        reporter.heartbeat("loading", 0)
        state, manifest = read_weights(store, _source(attempt).prefix, spec.weights)
        reporter.heartbeat("exporting", 0)
        with tempfile.TemporaryDirectory(prefix="patchwork-export-") as folder:
            try:
                export_weights(store, attempt.job_id, spec.format, state, manifest, Path(folder))
            except ValueError as error:
                raise JobError(f"format: {error}") from error
    reporter.heartbeat("finishing", 0)
    return RankOutcome(ExitReason.COMPLETED)


def _import(attempt: AttemptFile, spec: ImportJob, ranks: Ranks, reporter: Reporter, store: ObjectStore) -> RankOutcome:
    # A checkpoint to continue from is the one this job makes: an earlier attempt died when all was done.
    if ranks.is_first and attempt.resume_from is None:
        with tempfile.TemporaryDirectory(prefix="patchwork-import-") as folder:
            reporter.checkpoint(
                import_weights(attempt, spec, store, Path(folder), lambda: reporter.heartbeat("importing", 0))
            )
    reporter.heartbeat("finishing", 0)
    return RankOutcome(ExitReason.COMPLETED)


def _open(
    attempt: AttemptFile,
    data: DataConfig,
    config: NetworkConfig,
    store: ObjectStore,
    data_root: Path | None,
    eval_only: bool,
) -> OpenedData:
    assert attempt.dataset is not None, "an attempt that reads data names its data set"
    if config.has_classifier and attempt.dataset.num_classes > config.num_classes:
        raise JobError(
            f"model.num_classes {config.num_classes}: data set {attempt.dataset.name} has {attempt.dataset.num_classes}"
        )
    return open_data(data, attempt.dataset, data_root, store.get, in_channels=config.in_channels, eval_only=eval_only)


def _open_probes(
    attempt: AttemptFile,
    few_shot: FewShot | None,
    neighbours: Neighbours | None,
    opened: OpenedData,
    data: DataConfig,
    config: NetworkConfig,
    store: ObjectStore,
    data_root: Path | None,
) -> tuple[Probe, ...]:
    assert attempt.dataset is not None
    own_classes = attempt.dataset.num_classes
    return open_probes(few_shot, neighbours, opened, own_classes, data, data_root, store.get, config.in_channels)


def _source(attempt: AttemptFile) -> CheckpointSource:
    assert attempt.init_from is not None, "this kind of job starts from a checkpoint"
    return attempt.init_from


def _facts(attempt: AttemptFile, spec: TrainingJob, config: NetworkConfig, opened: OpenedData) -> CheckpointFacts:
    assert attempt.dataset is not None
    assert spec.schedule.total_steps is not None
    parent = None
    if attempt.resume_from is not None:
        job_id, step, number = parse_checkpoint_id(attempt.resume_from.checkpoint_id)
        parent = ParentCut(attempt=number, step=step) if job_id == attempt.job_id else None
    return CheckpointFacts(
        job_id=attempt.job_id,
        attempt=attempt.number,
        parent=parent,
        total_steps=spec.schedule.total_steps,
        global_batch_size=spec.train.global_batch_size,
        optimizer=spec.optim.name,
        spec_hash=attempt.spec_hash,
        training_fingerprint=attempt.training_fingerprint,
        data_fingerprint=attempt.dataset.fingerprint,
        model=config,
        preprocess=Preprocess(
            image_size=config.image_size,
            in_channels=config.in_channels,
            mean=spec.data.mean,
            std=spec.data.std,
            crop=spec.data.eval_crop,
            class_names=opened.class_names,
        ),
    )


def _tell(reporter: Reporter) -> OnCorrupt:
    def tell(image: CorruptImage) -> None:
        reporter.event("image.corrupt", image.message, {"index": image.index, "name": image.name, "count": image.count})

    return tell


class _LastStep:
    """Passes everything on, and remembers the step, for the outcome of a rank that fails."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.step = 0
        self.metric = reporter.metric
        self.event = reporter.event
        self.checkpoint = reporter.checkpoint
        self.desired = reporter.desired
        self.flush = reporter.flush
        self.take_measured = reporter.take_measured

    def heartbeat(self, phase: Phase, step: int) -> None:
        self.step = step
        self._reporter.heartbeat(phase, step)
