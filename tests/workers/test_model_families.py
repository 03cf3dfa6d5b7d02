"""Each family of models under every ZeRO stage: the same losses, and resume to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import vit
from configs.imports import ImportModel
from configs.layout import export_prefix, report_key
from configs.load import parse_spec
from configs.reasons import ExitReason
from configs.resolve import SourceCheckpoint, resolve
from configs.wire import EvaluationReport
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import TINY, card_of, make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Result, Run, assert_same_bits, read_state, run_attempts
from vit.formats import read_weights as read_file
from workers.checkpoint import read_manifest, read_weights

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]  # the fixture holds many runs

STAGES = (0, 1, 2, 3)
NO_SIZES = dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads", "mlp_dim"))
FAMILIES: dict[str, dict[str, Any]] = {
    "bit": {
        # Large enough that no group norm reads a handful of numbers, which would blow rounding up.
        "model": {
            **NO_SIZES,
            "image_size": 32,
            "dropout": 0.0,
            "drop_path": 0.0,
            "resnet": {"layers": [1, 2], "width": 32},
        },
        "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4},
        "schedule": {"decay": "steps"},
        "eval": {"at_end": True, "few_shot": {"shots": [1, 3], "num_seeds": 2}},
    },
    "hybrid": {"model": {"patch_size": 1, "stem": {"layers": [1], "width": 32}}},
    "relative, map, registers, qk_norm": {
        "model": {"pos_embed": "relative", "pool": "map", "registers": 2, "qk_norm": True},
        "optim": {"lr": 0.02, "layer_decay": 0.8},
    },
    "2-D positions of every layer": {
        "model": {"pos_embed": "learned_2d", "pos_embed_at": "every_layer"},
        "train": {"precision": "bf16"},
    },
    "shared positions of every layer": {"model": {"pos_embed_at": "every_layer_shared"}},
}
BIT = saved_at(6, 1)
VARIANTS = [(name, stage) for name in FAMILIES for stage in STAGES]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[DirStore, dict[tuple[str, int], Result], dict[tuple[str, int], Result]]:
    """Each family at each stage, whole; and again from its third step, by other processes."""
    root = tmp_path_factory.mktemp("families")
    specs = [
        tiny_spec(zero={"stage": stage}, checkpoint={"every_steps": 3}, **FAMILIES[name]) for name, stage in VARIANTS
    ]
    whole = [Run(make_attempt(spec, 2, 2 * i + 1)) for i, spec in enumerate(specs)]
    resumed = [
        Run(make_attempt(spec, 2, 2 * i + 2, resume_from=saved_at(3, 2 * i + 1))) for i, spec in enumerate(specs)
    ]
    first = run_ranks(2, run_attempts, whole, str(root))[0]
    second = run_ranks(2, run_attempts, resumed, str(root))[0]
    return DirStore(root), dict(zip(VARIANTS, first, strict=True)), dict(zip(VARIANTS, second, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_agree_and_learn(runs: Any, name: str) -> None:
    _, whole, _ = runs
    losses = whole[name, 0].losses
    # Under autocast the ranks' gradients are summed in another order, and bfloat16 shows it.
    tolerance = 1e-4 if "train" in FAMILIES[name] else 1e-5
    for stage in STAGES:
        assert whole[name, stage].outcome.reason is ExitReason.COMPLETED, whole[name, stage].outcome
        assert whole[name, stage].losses == pytest.approx(losses, abs=tolerance)
    assert min(losses[2:]) < losses[0]


def test_a_resnets_features_are_evaluated(runs: Any) -> None:
    _, whole, _ = runs
    found = [whole["bit", stage].metrics for stage in STAGES]
    for metrics in found:
        assert metrics["eval/loss"][6] == pytest.approx(found[0]["eval/loss"][6], abs=1e-5)
        assert 0.0 <= metrics["eval/few_shot/3"][6] <= 1.0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_resume_is_exact(runs: Any, variant: tuple[str, int]) -> None:
    store, whole, resumed = runs
    assert resumed[variant].outcome.reason is ExitReason.COMPLETED, resumed[variant].outcome
    assert resumed[variant].losses == whole[variant].losses[3:]
    number = 2 * VARIANTS.index(variant) + 1
    _, state = read_state(store, saved_at(6, number).prefix)
    _, again = read_state(store, saved_at(6, number + 1).prefix)
    assert_same_bits(state, again)


@pytest.fixture(scope="module")
def followers(runs: Any) -> tuple[DirStore, list[Result]]:
    """From the ResNet's checkpoint: an evaluation at its own size and at another, two exports and a fine-tune."""
    store, _, _ = runs
    manifest = read_manifest(store, BIT.prefix)
    data = tiny_spec(**FAMILIES["bit"]).data
    source = SourceCheckpoint(BIT.checkpoint_id, BIT.prefix, manifest.model, manifest.preprocess, data)
    one = {"init_from": BIT.checkpoint_id, "resources": {"workers": 1, "gpus_per_worker": 0}}
    tuned = {"kind": "finetune", "model": {"image_size": 48}, "eval": {"at_end": True}, "optim": {"lr": 0.02}}
    jobs = [
        one | {"kind": "evaluate"},
        one | {"kind": "evaluate", "image_size": 48},
        one | {"kind": "export"},
        one | {"kind": "export", "format": "npz"},
        TINY | one | tuned,
    ]
    attempts = []
    for letter, raw in zip("BCDEF", jobs, strict=True):
        spec = parse_spec(raw)
        card = card_of(tiny_spec()) if raw["kind"] == "evaluate" else card_of(spec)
        job_id = f"job_01JZZZZZZZZZZZZZZZZZZZZZZ{letter}"
        attempts.append(Run(make_attempt(resolve(spec, card, source), 1, 1, job_id, init_from=BIT)))
    return store, run_ranks(1, run_attempts, attempts, str(store.root))[0]


def test_a_resnets_checkpoint_is_evaluated_and_fine_tuned(runs: Any, followers: Any) -> None:
    _, whole, _ = runs
    store, results = followers
    assert [result.outcome.reason for result in results] == [ExitReason.COMPLETED] * 5, results
    report = EvaluationReport.model_validate_json(store.get(report_key("job_01JZZZZZZZZZZZZZZZZZZZZZZB")))
    assert report.metrics["eval/loss"] == pytest.approx(whole["bit", 0].metrics["eval/loss"][6], abs=1e-5)
    larger = EvaluationReport.model_validate_json(store.get(report_key("job_01JZZZZZZZZZZZZZZZZZZZZZZC")))
    assert larger.metrics["eval/loss"] != report.metrics["eval/loss"]
    assert results[4].losses[0] == pytest.approx(math.log(6), abs=1e-5)  # a new head starts at zero
    assert results[4].metrics["eval/loss"][6] > 0


def test_a_resnets_exports_hold_its_weights(followers: Any) -> None:
    store, _ = followers
    weights, manifest = read_weights(store, BIT.prefix)
    folder = store.root / export_prefix("job_01JZZZZZZZZZZZZZZZZZZZZZZD", "safetensors")
    model = vit.load(folder)
    assert isinstance(model, vit.BiT)
    official = store.root / export_prefix("job_01JZZZZZZZZZZZZZZZZZZZZZZE", "npz") / "model.npz"
    read = read_file(official, ImportModel(image_size=32))
    assert read.config == manifest.model == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
        assert torch.equal(tensor, read.state[name])
