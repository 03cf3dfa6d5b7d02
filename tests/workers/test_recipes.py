"""Recipes under every ZeRO stage: the same losses, and resume to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.reasons import ExitReason
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Result, Run, assert_same_bits, read_state, run_attempts
from workers.checkpoint import CheckpointMismatch, read_weights

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]  # the fixture holds many runs

STAGES = (0, 1, 2, 3)
SOURCE = {"type": "synthetic", "num_train": 70, "num_eval": 21, "num_classes": 6, "image_size": 8}
AUGMENTED = {"randaugment": {"ops": "timm", "magnitude_std": 0.5}, "random_erasing": 0.3, "repeats": 2}
MIXED = {"source": SOURCE, "mix": {"mixup": 0.8, "cutmix": 1.0}}
RECIPES: dict[str, dict[str, Any]] = {
    "lamb": {"optim": {"name": "lamb", "lr": 0.05, "weight_decay": 0.1}},
    "lamb, layer decay, bf16": {
        "optim": {"name": "lamb", "lr": 0.05, "weight_decay": 0.1, "layer_decay": 0.7},
        "train": {"precision": "bf16"},
    },
    "layer decay": {"optim": {"name": "adamw", "lr": 0.02, "weight_decay": 0.1, "layer_decay": 0.6}},
    "head": {"optim": {"name": "sgd", "lr": 0.4, "train": "head"}},
    "attention, sincos2d": {"optim": {"train": "attention"}, "model": {"pos_embed": "sincos2d"}},
    "mixup and cutmix": {
        "data": MIXED,
        "train": {"label_smoothing": 0.1},
        "optim": {"lr": 0.02},
    },
    "bce, mixed": {"data": MIXED, "train": {"loss": "bce"}, "optim": {"lr": 0.02}},
    "augmented": {"data": {"source": SOURCE, "augment": AUGMENTED}, "optim": {"lr": 0.02}},
    "ema": {
        "train": {"ema_decay": 0.7},
        "eval": {"every_steps": 2, "at_end": True, "weights": "ema"},
        "optim": {"lr": 0.02},
    },
    "ema, head": {"train": {"ema_decay": 0.7}, "optim": {"name": "sgd", "lr": 0.5, "train": "head"}},
    "bce": {"train": {"loss": "bce"}, "optim": {"lr": 0.02}},
    "masked patches": {
        "train": {"objective": "masked_patch", "ema_decay": 0.7},
        "eval": {"every_steps": 3, "at_end": True, "weights": "ema"},
        "optim": {"lr": 0.02, "layer_decay": 0.7},
    },
    "masked patches of a hybrid": {
        "model": {"patch_size": 1, "stem": {"layers": [1], "width": 32}, "pool": "gap", "registers": 1},
        "train": {"objective": "masked_patch", "activation_checkpointing": True},
        "optim": {"lr": 0.02},
    },
    "layer scale, mean of patches": {
        "model": {"layer_scale": 0.1, "pool": "patch_mean", "drop_path_rule": "uniform"},
        "data": {"source": SOURCE, "augment": {"crop": "simple"}},
        "optim": {"name": "adamw", "lr": 0.02, "weight_decay": 0.1, "layer_decay": 0.65},
        "schedule": {"min_lr": 1e-3},
    },
}
VARIANTS = [(name, stage) for name in RECIPES for stage in STAGES]


def spec_of(name: str, stage: int) -> Any:
    return tiny_spec(zero={"stage": stage}, checkpoint={"every_steps": 3}, **RECIPES[name])


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[DirStore, dict[tuple[str, int], Result], dict[tuple[str, int], Result]]:
    """Each recipe at each stage, whole; and again from its third step, by other processes."""
    root = tmp_path_factory.mktemp("recipes")
    whole = [Run(make_attempt(spec_of(*variant), 2, 2 * i + 1)) for i, variant in enumerate(VARIANTS)]
    resumed = [
        Run(make_attempt(spec_of(*variant), 2, 2 * i + 2, resume_from=saved_at(3, 2 * i + 1)))
        for i, variant in enumerate(VARIANTS)
    ]
    first = run_ranks(2, run_attempts, whole, str(root))[0]
    second = run_ranks(2, run_attempts, resumed, str(root))[0]
    return DirStore(root), dict(zip(VARIANTS, first, strict=True)), dict(zip(VARIANTS, second, strict=True))


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("name", RECIPES)
def test_stages_agree(runs: Any, name: str, stage: int) -> None:
    _, whole, _ = runs
    assert whole[name, stage].outcome.reason is ExitReason.COMPLETED, whole[name, stage].outcome
    assert whole[name, stage].losses == pytest.approx(whole[name, 0].losses, abs=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_resume_is_exact(runs: Any, variant: tuple[str, int]) -> None:
    store, whole, resumed = runs
    assert resumed[variant].outcome.reason is ExitReason.COMPLETED, resumed[variant].outcome
    assert resumed[variant].losses == whole[variant].losses[3:]
    number = 2 * VARIANTS.index(variant) + 1
    _, state = read_state(store, saved_at(6, number).prefix)
    _, again = read_state(store, saved_at(6, number + 1).prefix)
    assert_same_bits(state, again)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["head", "attention, sincos2d", "ema, head"])
def test_frozen_weights_stay_and_have_no_moments(runs: Any, name: str, stage: int) -> None:
    store, _, _ = runs
    number = 2 * VARIANTS.index((name, stage)) + 1
    _, early = read_state(store, saved_at(3, number).prefix)
    _, late = read_state(store, saved_at(6, number).prefix)
    changed = {
        name for kind, name in early if kind == "weight" and not torch.equal(early[kind, name], late[kind, name])
    }
    moved = {name for kind, name in early if kind not in ("weight", "ema")}
    assert changed == moved
    if name != "attention, sincos2d":
        assert changed == {"head.weight", "head.bias"}
    else:
        assert "pos_embed" not in changed
        assert {"head.weight", "blocks.1.attn.qkv.weight"} <= changed
        assert not any(".mlp." in weight or ".norm" in weight for weight in changed)


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_is_of_every_step(runs: Any, stage: int, tmp_path: Path) -> None:
    """Against weights saved after each step of the same run."""
    store, whole, _ = runs
    number = 2 * VARIANTS.index(("ema", stage)) + 1
    spec = spec_of("ema", stage).model_copy(update={"checkpoint": tiny_spec(checkpoint={"every_steps": 1}).checkpoint})
    results = run_ranks(2, run_attempts, [Run(make_attempt(spec, 2))], str(tmp_path))[0]
    assert results[0].losses == whole["ema", stage].losses
    folder = DirStore(tmp_path)
    # The first update has the learning rate 0, so the weights of step 1 are those that training starts with.
    _, state = read_state(folder, saved_at(1).prefix)
    average = {name: tensor for (kind, name), tensor in state.items() if kind == "weight"}
    for step in range(1, 7):
        _, state = read_state(folder, saved_at(step).prefix)
        average = {name: 0.7 * tensor + 0.3 * state["weight", name] for name, tensor in average.items()}
    _, last = read_state(store, saved_at(6, number).prefix)
    for name, tensor in average.items():
        torch.testing.assert_close(last["ema", name], tensor, rtol=1e-5, atol=1e-6)
        assert not torch.equal(last["ema", name], last["weight", name])


def test_the_average_is_what_is_evaluated(runs: Any, tmp_path: Path) -> None:
    store, whole, resumed = runs
    raw = tiny_spec(**(RECIPES["ema"] | {"eval": {"every_steps": 2, "at_end": True}}))
    plain = run_ranks(2, run_attempts, [Run(make_attempt(raw, 2))], str(tmp_path))[0][0]
    assert plain.losses == whole["ema", 0].losses, "evaluating the average left its mark on training"
    for stage in STAGES:
        losses = whole["ema", stage].metrics["eval/loss"]
        assert losses == pytest.approx(whole["ema", 0].metrics["eval/loss"], abs=1e-5)
        assert losses != pytest.approx(plain.metrics["eval/loss"], abs=1e-4)
        assert resumed["ema", stage].metrics["eval/loss"][6] == losses[6]
    number = 2 * VARIANTS.index(("ema", 3)) + 1
    weights, _ = read_weights(store, saved_at(6, number).prefix, "ema")
    _, state = read_state(store, saved_at(6, number).prefix)
    assert all(torch.equal(weights[name], state["ema", name]) for name in weights)
    with pytest.raises(CheckpointMismatch, match=r"without train\.ema_decay"):
        read_weights(store, saved_at(6, 1).prefix, "ema")


def test_mixing_does_not_depend_on_workers_and_micro_batches(runs: Any, tmp_path: Path) -> None:
    steady = {"dropout": 0.0, "drop_path": 0.0}
    losses = []
    for world_size, micro in ((1, 16), (1, 2), (2, 4)):
        spec = tiny_spec(model=steady, data=MIXED, train={"micro_batch_size": micro, "label_smoothing": 0.1})
        attempt = make_attempt(spec, world_size, 10 * world_size + micro)
        losses.append(run_ranks(world_size, run_attempts, [Run(attempt)], str(tmp_path))[0][0].losses)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_recipes_learn_and_differ(runs: Any) -> None:
    """Or the comparisons above would compare nothing."""
    _, whole, _ = runs
    losses = {name: tuple(whole[name, 0].losses) for name in RECIPES}
    assert len(set(losses.values())) == len(RECIPES)
    for name in ("lamb", "layer decay", "head", "bce"):
        assert losses[name][-1] < losses[name][0]


def test_a_probe_moves_to_another_stage(runs: Any, tmp_path: Path) -> None:
    """Frozen weights too are found by name, whoever holds them."""
    store, whole, _ = runs
    number = 2 * VARIANTS.index(("head", 3)) + 1
    moved = [
        Run(make_attempt(spec_of("head", stage), 2, 900 + stage, resume_from=saved_at(3, number))) for stage in (0, 1)
    ]
    for result in run_ranks(2, run_attempts, moved, str(store.root))[0]:
        assert result.losses == pytest.approx(whole["head", 0].losses[3:], abs=1e-5)
