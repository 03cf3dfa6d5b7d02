"""Whole attempts of every kind on generated images: fine-tune, evaluate, export, and how they fail."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vit
from configs.data import DataConfig
from configs.layout import export_prefix, report_key
from configs.load import parse_spec
from configs.reasons import ExitReason
from configs.resolve import SourceCheckpoint, resolve
from configs.states import Desired
from configs.wire import EvaluationReport
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import OTHER_JOB, card_of, make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Result, Run, run_attempts
from vit.transfer import transfer_weights
from workers.checkpoint import read_manifest, read_weights
from workers.export import export_weights
from workers.shards import CheckpointCorrupt

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]  # fixtures hold many runs

SOURCE = saved_at(6, 1)
SOURCE_DATA = {"source": {"type": "synthetic", "num_train": 70, "num_eval": 21, "num_classes": 6, "image_size": 8}}
EVAL_JOB, EXPORT_JOB, TIMM_JOB = (f"job_01JZZZZZZZZZZZZZZZZZZZZZZ{letter}" for letter in "ABC")


def source_of(store: DirStore) -> SourceCheckpoint:
    manifest = read_manifest(store, SOURCE.prefix)
    data = DataConfig.model_validate(SOURCE_DATA)
    return SourceCheckpoint(SOURCE.checkpoint_id, SOURCE.prefix, manifest.model, manifest.preprocess, data)


def job_of(store: DirStore, kind: str, **parts: Any) -> Any:
    """A job that starts from SOURCE, resolved as at submission."""
    raw = {"kind": kind, "init_from": SOURCE.checkpoint_id, "resources": {"workers": 1, "gpus_per_worker": 0}} | parts
    spec = parse_spec(raw)
    card = card_of(tiny_spec()) if kind == "evaluate" and getattr(spec, "data", None) is None else card_of(spec)
    return resolve(spec, card, source_of(store))


def evaluation_attempt(spec: Any, world_size: int, number: int = 1, job_id: str = EVAL_JOB) -> Any:
    return make_attempt(spec, world_size, number, job_id, init_from=SOURCE)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DirStore:
    """A trained checkpoint, evaluated at its end."""
    root = tmp_path_factory.mktemp("source")
    spec = tiny_spec(zero={"stage": 1}, eval={"at_end": True})
    result = run_ranks(2, run_attempts, [Run(make_attempt(spec, 2))], str(root))[0][0]
    assert result.outcome.reason is ExitReason.COMPLETED
    return DirStore(root)


# -- fine-tune ---------------------------------------------------------------------------------------------------------
FINETUNE: dict[str, Any] = {
    "model": {"image_size": 12, "dropout": 0.1},
    "data": {"source": {"type": "synthetic", "num_train": 64, "num_eval": 16, "num_classes": 9, "image_size": 12}},
    "optim": {"name": "sgd", "lr": 0.05},
    "schedule": {"total_steps": 4, "warmup_steps": 1},
    "train": {"global_batch_size": 16, "micro_batch_size": 4, "precision": "fp32", "log_every_steps": 1},
    "checkpoint": {"every_steps": 1},
}


@pytest.fixture(scope="module")
def finetuned(store: DirStore) -> tuple[Any, dict[int, list[Result]]]:
    specs = {stage: job_of(store, "finetune", **FINETUNE, zero={"stage": stage}) for stage in (0, 3)}
    runs = [Run(make_attempt(spec, 2, stage + 1, OTHER_JOB, init_from=SOURCE)) for stage, spec in specs.items()]
    resumed = Run(make_attempt(specs[3], 2, 9, OTHER_JOB, init_from=SOURCE, resume_from=saved_at(2, 4, OTHER_JOB)))
    by_rank = run_ranks(2, run_attempts, [*runs, resumed], str(store.root))
    return specs[0], dict(zip([0, 3, 9], (list(results) for results in zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize("stage", [0, 3])
def test_finetuning_starts_from_zero_logits(finetuned: tuple[Any, dict[int, list[Result]]], stage: int) -> None:
    """All logits 0: the loss is ln 9 at the first step, and (learning rate 0) at the second."""
    _, results = finetuned
    result = results[stage][0]
    assert result.outcome.reason is ExitReason.COMPLETED
    assert result.losses[:2] == pytest.approx([math.log(9)] * 2, abs=1e-6)
    assert result.losses[2] != pytest.approx(math.log(9), abs=1e-6)


@pytest.mark.parametrize("attempt", [1, 4])
def test_finetuning_starts_from_the_transferred_weights_on_all_ranks(
    store: DirStore, finetuned: tuple[Any, dict[int, list[Result]]], attempt: int
) -> None:
    spec, _ = finetuned
    weights, source = read_weights(store, SOURCE.prefix)
    # The first update has learning rate 0.
    started, manifest = read_weights(store, saved_at(1, attempt, OTHER_JOB).prefix)
    expected = transfer_weights(weights, source.model, spec.model.vit())
    assert manifest.model.image_size == (12, 12)
    assert started["pos_embed"].shape == (1, 10, 24)
    for name, tensor in expected.items():
        assert torch.equal(started[name], tensor), name
    assert started.keys() - expected.keys() == {"head.weight", "head.bias"}
    assert not started["head.weight"].any()


def test_a_resumed_finetune_reads_its_own_checkpoint(finetuned: tuple[Any, dict[int, list[Result]]]) -> None:
    _, results = finetuned
    assert results[9][0].outcome.reason is ExitReason.COMPLETED
    assert results[9][0].losses == results[3][0].losses[2:]


def test_a_head_may_be_kept_and_a_norm_replaced(store: DirStore) -> None:
    """For the checkpoint's classes its head goes on; as MAE fine-tunes, there is a new norm after the mean."""
    same = FINETUNE | {"data": SOURCE_DATA}
    jobs = {
        "kept": job_of(store, "finetune", **same, keep_head=True),
        "mean": job_of(store, "finetune", **(same | {"model": FINETUNE["model"] | {"pool": "patch_mean"}})),
    }
    attempts = [make_attempt(spec, 1, 20 + i, OTHER_JOB, init_from=SOURCE) for i, spec in enumerate(jobs.values())]
    results = run_ranks(1, run_attempts, [Run(attempt) for attempt in attempts], str(store.root))[0]
    weights, source = read_weights(store, SOURCE.prefix)
    started = {name: read_weights(store, saved_at(1, 20 + i, OTHER_JOB).prefix)[0] for i, name in enumerate(jobs)}
    assert [result.outcome.reason for result in results] == [ExitReason.COMPLETED] * 2
    assert results[0].losses[0] != pytest.approx(math.log(6), abs=1e-3)
    assert results[1].losses[0] == pytest.approx(math.log(6), abs=1e-6)
    for name in ("head.weight", "head.bias", "norm.weight"):
        assert torch.equal(started["kept"][name], weights[name])
    assert started["kept"].keys() == weights.keys()
    assert (started["mean"]["fc_norm.weight"] == 1).all()
    assert started["mean"].keys() - weights.keys() == {"fc_norm.weight", "fc_norm.bias"}
    assert weights.keys() - started["mean"].keys() == {"norm.weight", "norm.bias"}
    assert source.model.pool == "cls"


# -- evaluate ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def evaluated(store: DirStore) -> dict[Any, Result]:
    jobs = {
        "as trained": job_of(store, "evaluate", batch_size=4),
        "larger images": job_of(store, "evaluate", batch_size=4, image_size=12),
        "bf16": job_of(store, "evaluate", batch_size=4, precision="bf16"),
    }
    results: dict[Any, Result] = {}
    for world_size in (1, 2):
        runs = [Run(evaluation_attempt(spec, world_size)) for spec in reversed(jobs.values())]
        found = run_ranks(world_size, run_attempts, runs, str(store.root))[0]
        results |= {(name, world_size): result for name, result in zip(reversed(jobs), found, strict=True)}
    return results


def test_evaluation_repeats_what_training_measured(store: DirStore, evaluated: dict[Any, Result]) -> None:
    trained = read_manifest(store, SOURCE.prefix).metrics
    for world_size in (1, 2):
        result = evaluated["as trained", world_size]
        assert result.outcome.reason is ExitReason.COMPLETED
        found = {name: points[6] for name, points in result.metrics.items()}
        assert found == pytest.approx(trained, abs=1e-6)
        assert found["eval/num_examples"] == 21


def test_evaluation_does_not_depend_on_the_number_of_workers(evaluated: dict[Any, Result]) -> None:
    for name in ("as trained", "larger images", "bf16"):
        one, two = evaluated[name, 1].metrics, evaluated[name, 2].metrics
        for metric in ("eval/top1", "eval/top5", "eval/num_examples"):
            assert one[metric] == two[metric]
        assert one["eval/loss"][6] == pytest.approx(two["eval/loss"][6], abs=1e-6)
    assert evaluated["larger images", 1].metrics["eval/loss"] != evaluated["as trained", 1].metrics["eval/loss"]


def test_evaluation_writes_its_report(store: DirStore, evaluated: dict[Any, Result]) -> None:
    report = EvaluationReport.model_validate_json(store.get(report_key(EVAL_JOB)))
    assert (report.job_id, report.checkpoint_id) == (EVAL_JOB, SOURCE.checkpoint_id)
    assert (report.dataset, report.split, report.num_examples) == ("synthetic", "test", 21)
    assert report.metrics == {name: points[6] for name, points in evaluated["as trained", 2].metrics.items()}


# -- export ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def exported(store: DirStore) -> dict[str, Result]:
    runs = [
        Run(make_attempt(job_of(store, "export", format=fmt), 1, 1, job_id, init_from=SOURCE))
        for fmt, job_id in (("safetensors", EXPORT_JOB), ("timm", TIMM_JOB))
    ]
    found = run_ranks(1, run_attempts, runs, str(store.root))[0]
    return dict(zip(("safetensors", "timm"), found, strict=True))


def test_exported_weights_open_in_one_line(store: DirStore, exported: dict[str, Result]) -> None:
    assert exported["safetensors"].outcome.reason is ExitReason.COMPLETED, exported["safetensors"].outcome
    weights, manifest = read_weights(store, SOURCE.prefix)
    model = vit.load(store.root / export_prefix(EXPORT_JOB, "safetensors"))
    assert model.config == manifest.model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_exported_weights_open_in_timm(store: DirStore, exported: dict[str, Result]) -> None:
    assert exported["timm"].outcome.reason is ExitReason.COMPLETED, exported["timm"].outcome
    folder = store.root / export_prefix(TIMM_JOB, "timm")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = vit.load(store.root / export_prefix(EXPORT_JOB, "safetensors"))
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)


class Altering(DirStore):
    """A store that changes a byte of every file it is given."""

    def put_file(self, key: str, path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        self.put(key, bytes(content))


@pytest.mark.parametrize("fmt", ["safetensors", "timm"])
def test_an_export_that_comes_back_altered_is_no_success(store: DirStore, tmp_path: Path, fmt: str) -> None:
    weights, manifest = read_weights(store, SOURCE.prefix)
    with pytest.raises(CheckpointCorrupt, match="came back altered"):
        export_weights(Altering(tmp_path / "store"), EXPORT_JOB, fmt, weights, manifest, tmp_path / "folder")


# -- failures ----------------------------------------------------------------------------------------------------------
def test_failures_are_outcomes_with_their_reason(store: DirStore, tmp_path: Path) -> None:
    spec = tiny_spec()
    good = make_attempt(spec, 1)
    assert good.dataset is not None
    wrong_count = good.dataset.model_copy(
        update={"splits": (good.dataset.splits[0].model_copy(update={"num_examples": 71}), good.dataset.splits[1])}
    )
    more_classes = good.dataset.model_copy(update={"num_classes": 60})
    finetune = job_of(store, "finetune", **FINETUNE)
    cases = [
        (good.model_copy(update={"dataset": wrong_count}), ExitReason.DATA_ERROR, "71"),
        (good.model_copy(update={"dataset": more_classes}), ExitReason.SPEC_INVALID, "model.num_classes 6"),
        (good.model_copy(update={"resume_from": saved_at(99)}), ExitReason.CHECKPOINT_CORRUPT, "step-000000099"),
        (make_attempt(finetune, 1, init_from=saved_at(98)), ExitReason.CHECKPOINT_CORRUPT, "step-000000098"),
        (good.model_copy(update={"spec": {"kind": "pretrain"}}), ExitReason.PLATFORM_ERROR, "model"),
    ]
    results = run_ranks(1, run_attempts, [Run(attempt) for attempt, _, _ in cases], str(tmp_path))[0]
    for (_, reason, text), result in zip(cases, results, strict=True):
        assert result.outcome.reason is reason, result.outcome
        assert text in result.outcome.message
        assert result.outcome.error_type


def test_an_evaluation_can_be_stopped(store: DirStore) -> None:
    spec = job_of(store, "evaluate", batch_size=1)
    run = Run(evaluation_attempt(spec, 2, 7), {1: (2, Desired.PAUSE)})
    outcomes = [results[0].outcome for results in run_ranks(2, run_attempts, [run], str(store.root))]
    assert [outcome.reason for outcome in outcomes] == [ExitReason.PAUSED] * 2
    assert outcomes[0].step == outcomes[1].step < 11
