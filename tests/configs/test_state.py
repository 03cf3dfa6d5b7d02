"""The model of ZeRO's state memory against DeepSpeed's engine on two CPU ranks."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from configs.cost import num_parameters, state_bytes
from configs.load import apply_overrides, parse_spec
from configs.spec import TrainingJob
from tests.ranks import run_ranks
from vit import build
from workers.deepspeed_config import BUCKET_ELEMENTS
from workers.distributed import Ranks
from workers.engine import build_engine

SPEC: dict[str, Any] = {
    "kind": "pretrain",
    "model": {
        "patch_size": 4,
        "embed_dim": 256,
        "depth": 4,
        "num_heads": 4,
        "mlp_dim": 1024,
        "image_size": 16,
        "num_classes": 10,
    },
    "data": {"source": {"type": "synthetic"}},
    "schedule": {"total_steps": 3},
    "train": {"global_batch_size": 2, "precision": "bf16"},
    "resources": {"workers": 2, "gpus_per_worker": 0},
}


def job(stage: int, optimizer: str) -> TrainingJob:
    spec = parse_spec(apply_overrides(SPEC, {"zero.stage": stage, "optim.name": optimizer}))
    assert isinstance(spec, TrainingJob)
    return spec


def tensor_bytes() -> int:
    """Bytes of all living tensors of this process, DeepSpeed's communication buckets left out."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in storages.values() if size < 4 * BUCKET_ELEMENTS)


def engine_bytes(ranks: Ranks, stage: int, optimizer: str) -> float:
    spec = job(stage, optimizer)
    before = tensor_bytes()
    engine = build_engine(build(spec.model.vit()), spec, ranks, 1)
    found = tensor_bytes() - before
    assert engine.zero_stage == (stage if ranks.world_size > 1 else 0)
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "optimizer"), [(0, "adamw"), (1, "sgd"), (2, "adamw"), (3, "adamw")])
def test_state_before_the_first_gradients(stage: int, optimizer: str) -> None:
    config = job(stage, optimizer).model.vit()
    # Stage 3 allocates its part of the gradients at once, the others when the first backward pass makes them.
    gradients = {0: 4.0, 1: 4.0, 2: 4.0 / 2, 3: 0.0}[stage] * num_parameters(config)
    expected = state_bytes(config, stage, 2, optimizer) - gradients
    for found in run_ranks(2, engine_bytes, stage, optimizer):
        assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_worker_holds_what_stage_0_holds(stage: int) -> None:
    config = job(stage, "adamw").model.vit()
    expected = state_bytes(config, stage, 1, "adamw")
    assert expected == state_bytes(config, 0, 1, "adamw")
    found = run_ranks(1, engine_bytes, stage, "adamw")[0]
    assert found == pytest.approx(expected - 4.0 * num_parameters(config), rel=0.01)  # gradients come later
