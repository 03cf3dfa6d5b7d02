from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import Any

import pytest

from workers.deepspeed_config import deepspeed_config
from workers.engine import hidden


def make_config(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "zero_stage": 1,
        "precision": "bf16",
        "clip_grad_norm": 1.0,
        "global_batch_size": 64,
        "micro_batch_size": 4,
        "world_size": 2,
    }
    return deepspeed_config(**(arguments | changes))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_gets_the_same_precision(stage: int) -> None:
    config = make_config(zero_stage=stage)
    assert config["zero_optimization"]["stage"] == stage
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert "bf16" not in config
    assert "fp16" not in config
    assert "torch_autocast" not in make_config(zero_stage=stage, precision="fp32")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_schedules_and_optimizes_nothing_itself(stage: int) -> None:
    config = make_config(zero_stage=stage)
    assert not {"optimizer", "scheduler"} & config.keys()
    assert config["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize(("stage", "clip", "expected"), [(0, 1.0, 0.0), (1, 1.0, 1.0), (3, 0.5, 0.5), (2, None, 0.0)])
def test_clipping_is_deepspeeds_except_at_stage_0(stage: int, clip: float | None, expected: float) -> None:
    assert make_config(zero_stage=stage, clip_grad_norm=clip)["gradient_clipping"] == expected


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 16), (2, 8), (16, 1)])
def test_accumulation_makes_up_the_global_batch(world_size: int, accumulation: int) -> None:
    config = make_config(world_size=world_size)
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == accumulation


def test_batch_that_cannot_be_divided_is_refused_with_all_numbers() -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch_size 64 .* train\.micro_batch_size 4 x 3 workers"):
        make_config(world_size=3)


def test_stage_3_partitions_every_parameter() -> None:
    zero = make_config(zero_stage=3)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 0
    assert zero["memory_efficient_linear"] is False


def test_config_is_json() -> None:
    for stage in range(4):
        assert json.loads(json.dumps(make_config(zero_stage=stage))) == make_config(zero_stage=stage)


def test_deepspeed_is_imported_without_mlflow() -> None:
    # In a process of its own: here it may be imported already.
    program = "import sys; from workers.engine import _import_deepspeed as i; i(); print('mlflow' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"


def test_a_module_is_hidden_for_a_while_only() -> None:
    sys.modules.pop("colorsys", None)
    with hidden("colorsys"), pytest.raises(ImportError):
        importlib.import_module("colorsys")
    assert importlib.import_module("colorsys").rgb_to_hsv(0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)
    with hidden("colorsys"):
        assert importlib.import_module("colorsys")
