"""Masked patch prediction on several ranks: its numbers, and what follows from its checkpoint."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import vit
from configs.data import DataConfig
from configs.layout import export_prefix, pictures_prefix
from configs.load import parse_spec
from configs.reasons import ExitReason
from configs.resolve import SourceCheckpoint, resolve
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import TINY, card_of, make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Result, Run, run_attempts
from vit.masked import at_chosen
from workers.checkpoint import read_manifest, read_weights
from workers.data.augment import eval_transform
from workers.data.loader import normalise
from workers.data.open import open_data
from workers.evaluate import corruption_of

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]
STEADY = {"dropout": 0.0, "drop_path": 0.0, "pool": "gap"}
CHECKPOINT = saved_at(40, 2)


def spec(**train: Any) -> Any:
    return tiny_spec(
        model=STEADY,
        train={"objective": "masked_patch", **train},
        schedule={"total_steps": 40, "warmup_steps": 1},
        optim={"lr": 0.02},
        eval={"every_steps": 20, "at_end": True, "batch_size": 4, "few_shot": {"shots": [2], "num_seeds": 1}},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DirStore, dict[int, Result]]:
    """The same job on one worker and on two: equal micro-batches, in another order."""
    root = tmp_path_factory.mktemp("masked")
    results = {n: run_ranks(n, run_attempts, [Run(make_attempt(spec(), n, n))], str(root))[0][0] for n in (1, 2)}
    return DirStore(root), results


def test_it_learns_the_same_on_any_number_of_workers(trained: Any) -> None:
    _, results = trained
    for result in results.values():
        assert result.outcome.reason is ExitReason.COMPLETED, result.outcome
        assert result.losses[0] == pytest.approx(math.log(512), abs=1e-5), "the head starts at zero"
        assert result.losses[-1] < 0.7 * result.losses[0]
        assert result.metrics["eval/loss"][40] < result.metrics["eval/loss"][20]
        assert result.metrics["eval/num_examples"] == {20: 21.0, 40: 21.0}
        assert 0.0 <= result.metrics["train/top1"][40] <= 1.0
        assert result.metrics["eval/top1"][40] > 2 / 512
        assert "eval/few_shot/2" in result.metrics
    assert results[2].losses == pytest.approx(results[1].losses, abs=1e-4)
    assert results[2].metrics["train/top1"] == pytest.approx(results[1].metrics["train/top1"], abs=1e-2)


def test_what_is_evaluated_is_what_the_weights_say(trained: Any) -> None:
    """By hand, all images at once: on two ranks and in batches it was the same."""
    store, results = trained
    state, manifest = read_weights(store, CHECKPOINT.prefix)
    model = vit.build(manifest.model).eval()
    model.load_state_dict(state)
    data = DataConfig.model_validate(TINY["data"])
    card = card_of(tiny_spec())
    assert card is not None
    opened = open_data(data, card, None, store.get, in_channels=3)
    pixels = opened.eval.read_many(torch.arange(21).numpy())
    assert pixels is not None
    pixels = eval_transform(pixels, data, (8, 8))
    corruption = corruption_of(torch.arange(21), 4)
    with torch.no_grad():
        logits = model(normalise(pixels, data.mean, data.std), sources=corruption.sources)
    # Each patch is 4 x 4 pixels.
    means = pixels.double().unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(4, 5)).flatten(2)  # (B, channels, n)
    levels = (means / 32).floor().long()
    truth = at_chosen(levels[:, 0] * 64 + levels[:, 1] * 8 + levels[:, 2], corruption.chosen).flatten()
    predicted = at_chosen(logits, corruption.chosen).flatten(0, 1)
    found = results[2].metrics
    assert found["eval/loss"][40] == pytest.approx(float(torch.nn.functional.cross_entropy(predicted, truth)), abs=1e-5)
    assert found["eval/top1"][40] == pytest.approx(float((predicted.argmax(dim=1) == truth).double().mean()), abs=1e-9)


def test_its_checkpoint_is_fine_tuned_probed_exported_and_inspected(trained: Any) -> None:
    store, _ = trained
    manifest = read_manifest(store, CHECKPOINT.prefix)
    assert manifest.model.has_classifier is False
    data = DataConfig.model_validate(TINY["data"])
    source = SourceCheckpoint(CHECKPOINT.checkpoint_id, CHECKPOINT.prefix, manifest.model, manifest.preprocess, data)
    one = {"init_from": CHECKPOINT.checkpoint_id, "resources": {"workers": 1, "gpus_per_worker": 0}}
    jobs: list[dict[str, Any]] = [
        TINY | one | {"kind": "finetune", "model": {"image_size": 12}, "eval": {"at_end": True}},
        one | {"kind": "evaluate", "neighbours": {"k": 3}},
        one | {"kind": "export"},
        one | {"kind": "inspect", "num_images": 4, "num_rollout_images": 2},
    ]
    runs = []
    for letter, raw in zip("MNPQ", jobs, strict=True):
        job = parse_spec(raw)
        card = None if raw["kind"] == "export" else card_of(tiny_spec())
        attempt = make_attempt(
            resolve(job, card, source), 1, 1, f"job_01JZZZZZZZZZZZZZZZZZZZZZZ{letter}", init_from=CHECKPOINT
        )
        runs.append(Run(attempt))
    tuned, probed, exported, inspected = run_ranks(1, run_attempts, runs, str(store.root))[0]
    assert tuned.outcome.reason is ExitReason.COMPLETED, tuned.outcome
    assert tuned.losses[0] == pytest.approx(math.log(6), abs=1e-5), "a new head, for the classes of the data"
    assert tuned.metrics["eval/top1"]
    assert probed.outcome.reason is ExitReason.COMPLETED, probed.outcome
    assert set(probed.metrics) == {"eval/knn", "eval/num_examples"}
    assert exported.outcome.reason is ExitReason.COMPLETED, exported.outcome
    model = vit.load(store.root / export_prefix("job_01JZZZZZZZZZZZZZZZZZZZZZZP", "safetensors"))
    weights, _ = read_weights(store, CHECKPOINT.prefix)
    assert torch.equal(model.state_dict()["mask_token"], weights["mask_token"])
    assert inspected.outcome.reason is ExitReason.COMPLETED, inspected.outcome
    pictures = store.root / pictures_prefix("job_01JZZZZZZZZZZZZZZZZZZZZZZQ")
    with np.load(pictures / "attention_rollout.npz") as numbers:
        assert numbers["predicted"].tolist() == [-1, -1], "there is no classifier"
