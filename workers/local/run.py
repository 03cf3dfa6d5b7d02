"""`patchwork train`: an attempt in this process, its files in a folder.

    <out>/
        store/…          what would be in the object store: attempt files, checkpoints (configs/layout.py)
        metrics.jsonl    every point: name, step, value
        model/           the weights at the end, for vit.load

Run again it goes on from the last checkpoint, as a cluster would; a job that trains something else is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch.distributed import HashStore  # type: ignore[attr-defined]

from configs.data import AnySource, FolderSource
from configs.datasets import card_for
from configs.errors import SpecError
from configs.folder_index import FolderError, card, scan
from configs.ids import attempt_id, checkpoint_id, new_job_id, new_upload_id
from configs.imports import ImportModel, ImportPreprocess
from configs.layout import attempt_key, checkpoint_prefix, checkpoints_prefix, dataset_index_key, upload_key
from configs.lineage import cuts, join_skips, newest, parents_of_next
from configs.load import apply_overrides, parse_spec
from configs.probe_cards import fill_probes, probed_sources
from configs.reasons import EXIT_REASONS, ExitReason
from configs.resolve import SourceCheckpoint, canonical_json, resolve, spec_hash, training_fingerprint
from configs.spec import FinetuneJob, ImportJob, PretrainJob, TrainingJob, UploadedFile
from configs.wire import AttemptFile, CheckpointSource, DatasetCard, ModelFile
from vit.weights import CONFIG_NAME, WEIGHTS_NAME, read_model_file, save
from workers.attempt import run_rank
from workers.checkpoint import read_manifest, read_weights
from workers.distributed import init_ranks, leave_ranks
from workers.import_weights import import_weights
from workers.local.console import ConsoleReporter
from workers.local.folder_store import FolderStore
from workers.outcome import JobError, RankOutcome

INTERRUPTED = 130


@dataclass(frozen=True)
class _Start:
    """What the folder holds of this job already."""

    job_id: str
    attempts: tuple[AttemptFile, ...] = ()
    resume: tuple[int, int] | None = None
    """(attempt, step) of the checkpoint to continue from."""


def train_here(
    document: Mapping[str, Any],
    overrides: Mapping[str, Any],
    *,
    out: Path,
    data_root: Path | None,
    init: Path | None,
    fresh: bool,
    console: Console,
) -> int:
    """Train the job described by `document` in this process. Returns an exit code: 0 done, 1 failed, 130 stopped by
    Ctrl-C and saved. `init`: the weights a fine-tune starts from, a file or a folder that `patchwork fetch` made.

    Raises:
        SpecError: the description is not valid, or cannot be run here.
    """
    if fresh and out.exists():
        shutil.rmtree(out)
    store = FolderStore(out / "store")
    raw = apply_overrides(dict(document), dict(overrides))
    raw = apply_overrides(raw, _resources_here(raw))
    source = _import_init(store, raw, init, console)
    if source is not None:
        raw = {**raw, "init_from": source.checkpoint_id}
    spec = parse_spec(raw)
    if not isinstance(spec, PretrainJob | FinetuneJob):
        raise SpecError.at("/kind", "this command trains", spec.kind, "pretrain, finetune")
    dataset = _dataset(spec.data.source, store, data_root)
    resolved = resolve(fill_probes(spec, _probed_folders(spec, store, data_root)), dataset, source)
    assert isinstance(resolved, PretrainJob | FinetuneJob)
    attempt = _next_attempt(store, resolved, dataset, source, out)
    outcome = _run(attempt, resolved, store, data_root, out, console)
    return _conclude(outcome, attempt, resolved, store, out, console)


def _resources_here(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One worker on this machine's device; no more threads than it has cores."""
    given = raw.get("resources")
    wanted = given.get("cpus_per_worker") if isinstance(given, Mapping) else None
    cores = os.cpu_count() or 1
    return {
        "resources.workers": 1,
        "resources.gpus_per_worker": int(torch.cuda.is_available()),
        "resources.cpus_per_worker": min(wanted, cores) if isinstance(wanted, int) and wanted >= 1 else cores,
    }


# -- where the weights and the data come from --------------------------------------------------------------------------
def _import_init(
    store: FolderStore, raw: Mapping[str, Any], init: Path | None, console: Console
) -> SourceCheckpoint | None:
    """The weights file as a checkpoint of the folder's store, by the same way as `patchwork import`."""
    if raw.get("kind") != "finetune":
        if init is not None:
            raise SpecError.at("/kind", "--init gives the weights that a finetune job starts from", raw.get("kind"))
        return None
    if init is None:
        raise SpecError.at("/init_from", "a finetune in this process reads its weights from a file: give --init PATH")
    file = init / WEIGHTS_NAME if init.is_dir() else init
    if not file.is_file():
        raise SpecError.at("/init_from", "there is no such weights file", str(file))
    config_path = file.with_name(CONFIG_NAME)
    try:
        described = read_model_file(config_path) if config_path.is_file() else None
    except ValueError:
        described = None  # Another program's config.json: the file itself says what it is.
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    source_id = f"job_{_ulid_of(digest)}"
    prefix = checkpoint_prefix(source_id, 0, 1)
    if not (store.root / prefix / "manifest.json").exists():
        console.print(f"reading    {escape(str(file))}")
        _import(store, source_id, file, digest, described)
    manifest = read_manifest(store, prefix)
    return SourceCheckpoint(manifest.checkpoint_id, prefix, manifest.model, manifest.preprocess, None)


def _import(store: FolderStore, job_id: str, file: Path, digest: str, described: ModelFile | None) -> None:
    upload = UploadedFile(upload=new_upload_id(), name=file.name, num_bytes=file.stat().st_size, sha256=digest)
    prepared = ImportPreprocess()
    if described is not None:
        fields = described.preprocess.model_dump(include=set(ImportPreprocess.model_fields))
        prepared = ImportPreprocess.model_validate(fields)
    spec = ImportJob(
        kind="import",
        file=upload,
        model=ImportModel(),
        preprocess=prepared,
        config=None if described is None else described.model,
    )
    attempt = _attempt_file(job_id, 1, spec, "", None)
    store.put_file(upload_key(upload.upload), file)
    try:
        with tempfile.TemporaryDirectory(prefix="patchwork-import-") as folder:
            import_weights(attempt, spec, store, Path(folder), lambda: None)
    except JobError as error:
        raise SpecError.at("/init_from", str(error), str(file)) from error
    finally:
        store.delete([upload_key(upload.upload)])


def _ulid_of(digest: str) -> str:
    """The same id for the same file, so that it is read once."""
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    number = int(digest[:32], 16) & ((1 << 125) - 1)
    return "".join(alphabet[(number >> (5 * place)) & 31] for place in reversed(range(26)))


def _probed_folders(spec: TrainingJob, store: FolderStore, data_root: Path | None) -> dict[str, DatasetCard]:
    folders = [source for source in probed_sources(spec) if isinstance(source, FolderSource)]
    return {source.name: _dataset(source, store, data_root) for source in folders}


def _dataset(source: AnySource, store: FolderStore, data_root: Path | None) -> DatasetCard:
    if not isinstance(source, FolderSource):
        return card_for(source, {})
    if data_root is None:
        raise SpecError.at("/data/source/name", "an image folder lies under --data-root, which is not given")
    try:
        index = scan(data_root, source.name, source.name)
    except FolderError as error:
        raise SpecError.at("/data/source/name", str(error), source.name) from error
    key = dataset_index_key(source.name, index.fingerprint.removeprefix("sha256:"))
    store.put(key, index.model_dump_json().encode())
    return card(index, key)


# -- the attempt -------------------------------------------------------------------------------------------------------
def _next_attempt(
    store: FolderStore, spec: TrainingJob, dataset: DatasetCard, source: SourceCheckpoint | None, out: Path
) -> AttemptFile:
    """The next attempt of the job that `out` holds, written down; of a new job if it holds none.

    Raises:
        SpecError: what lies there was trained otherwise.
    """
    fingerprint = training_fingerprint(spec, dataset.fingerprint)
    start = _look(store)
    before = start.attempts[-1] if start.attempts else None
    if before is not None and before.training_fingerprint != fingerprint:
        raise SpecError.at(
            "/", f"{out} holds a run of another model, data, optimizer or schedule: give another --out, or --fresh"
        )
    number = len(start.attempts) + 1
    parents = parents_of_next(number, cuts(start.attempts), start.resume)
    resume = None if start.resume is None else _source(start.job_id, *start.resume)
    init = None if source is None else CheckpointSource(checkpoint_id=source.checkpoint_id, prefix=source.prefix)
    attempt = _attempt_file(start.job_id, number, spec, dataset.fingerprint, dataset).model_copy(
        update={
            "parents": parents,
            "resume_from": resume,
            "init_from": init,
            "skips": join_skips(*(a.skips for a in start.attempts)),
        }
    )
    store.put(attempt_key(attempt.attempt_id), attempt.model_dump_json(indent=1).encode(), if_none_match=True)
    return attempt


def _source(job_id: str, attempt: int, step: int) -> CheckpointSource:
    return CheckpointSource(
        checkpoint_id=checkpoint_id(job_id, step, attempt), prefix=checkpoint_prefix(job_id, step, attempt)
    )


def _look(store: FolderStore) -> _Start:
    files = sorted((store.root / "jobs").glob("job_*/attempts/*.json"))
    attempts = tuple(sorted((AttemptFile.model_validate_json(f.read_bytes()) for f in files), key=lambda a: a.number))
    if not attempts:
        return _Start(new_job_id())
    job_id = attempts[0].job_id
    saved = [(manifest.attempt, manifest.step) for manifest in _manifests(store, job_id)]
    return _Start(job_id, attempts, newest(saved, cuts(attempts)))


def _manifests(store: FolderStore, job_id: str) -> Iterator[Any]:
    for path in sorted((store.root / checkpoints_prefix(job_id)).glob("*/manifest.json")):
        yield read_manifest(store, path.parent.relative_to(store.root).as_posix() + "/")


def _attempt_file(
    job_id: str, number: int, spec: TrainingJob | ImportJob, data_fingerprint: str, dataset: DatasetCard | None
) -> AttemptFile:
    stored = canonical_json(spec)
    return AttemptFile(
        job_id=job_id,
        attempt_id=attempt_id(job_id, number),
        number=number,
        spec=json.loads(stored),
        spec_hash=spec_hash(stored),
        training_fingerprint=training_fingerprint(spec, data_fingerprint),
        world_size=1,
        dataset=dataset,
        created_at=datetime.now(UTC),
    )


def _run(
    attempt: AttemptFile,
    spec: TrainingJob,
    store: FolderStore,
    data_root: Path | None,
    out: Path,
    console: Console,
) -> RankOutcome:
    device = "cuda:0" if spec.resources.gpus_per_worker else "cpu"
    console.print(f"training   in this process on {device}, files in {escape(str(out))}")
    assert spec.schedule.total_steps is not None
    reporter = ConsoleReporter(
        console, out / "metrics.jsonl", spec.schedule.total_steps, lambda: _retain(store, attempt, spec)
    )
    ranks = init_ranks(0, 1, HashStore(), device)
    try:
        with reporter, _on_interrupt(reporter.leave, console):
            return run_rank(attempt, ranks, reporter, store, data_root)
    finally:
        leave_ranks()


def _retain(store: FolderStore, attempt: AttemptFile, spec: TrainingJob) -> None:
    """Keep the newest checkpoints only. The best are not kept apart: the last is what this command hands over."""
    manifests = sorted(_manifests(store, attempt.job_id), key=lambda m: (m.step, m.attempt))
    for manifest in manifests[: -spec.checkpoint.keep_last]:
        shutil.rmtree(store.root / checkpoint_prefix(manifest.job_id, manifest.step, manifest.attempt))


@contextmanager
def _on_interrupt(leave: Callable[[], None], console: Console) -> Iterator[None]:
    """The first Ctrl-C saves and leaves; the second ends the process as usual."""
    before = signal.getsignal(signal.SIGINT)

    def handle(_signal: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        console.print("Saving, then leaving; Ctrl-C again leaves at once.")
        leave()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _conclude(
    outcome: RankOutcome, attempt: AttemptFile, spec: TrainingJob, store: FolderStore, out: Path, console: Console
) -> int:
    if outcome.reason is ExitReason.USER_CANCELLED:
        console.print(f"Stopped at step {outcome.step:,}, saved. The same command goes on from there.")
        return INTERRUPTED
    if outcome.reason is not ExitReason.COMPLETED:
        console.print(f"[bold red]{outcome.reason}[/] at step {outcome.step:,}: {escape(outcome.message)}")
        if outcome.reason is ExitReason.LOSS_SPIKE:
            console.print("[dim]Only the server goes back by itself; here, lower optim.lr and begin with --fresh.[/]")
        else:
            console.print(f"[dim]{escape(EXIT_REASONS[outcome.reason].advice)}[/]")
        return 1
    resume = _look(store).resume
    assert resume is not None, "a run that completed has saved"
    state, manifest = read_weights(
        store, checkpoint_prefix(attempt.job_id, resume[1], resume[0]), "ema" if spec.train.ema_decay else "raw"
    )
    model_file = ModelFile(
        model=manifest.model,
        preprocess=manifest.preprocess,
        checkpoint_id=manifest.checkpoint_id,
        job_id=manifest.job_id,
        step=manifest.step,
        metrics=manifest.metrics,
    )
    save(state, model_file, out / "model")
    top1 = manifest.metrics.get("eval/top1")
    measured = "" if top1 is None else f", top-1 {top1:.2%}"
    console.print(f"[bold green]Done[/]: {outcome.step:,} steps{measured}. Weights: vit.load({str(out / 'model')!r})")
    return 0
