"""Each family of models under every ZeRO stage: the same losses, and resume to the bit."""

from __future__ import annotations

from typing import Any

import pytest

from configs.reasons import ExitReason
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import make_attempt, saved_at, tiny_spec
from tests.workers.rank_jobs import Result, Run, assert_same_bits, read_state, run_attempts

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


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_resume_is_exact(runs: Any, variant: tuple[str, int]) -> None:
    store, whole, resumed = runs
    assert resumed[variant].outcome.reason is ExitReason.COMPLETED, resumed[variant].outcome
    assert resumed[variant].losses == whole[variant].losses[3:]
    number = 2 * VARIANTS.index(variant) + 1
    _, state = read_state(store, saved_at(6, number).prefix)
    _, again = read_state(store, saved_at(6, number + 1).prefix)
    assert_same_bits(state, again)
