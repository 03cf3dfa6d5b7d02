from __future__ import annotations

from typing import Any

import pytest

from configs.cost import (
    GIB,
    activation_bytes,
    checkpoint_bytes,
    divisors,
    largest_micro_batch,
    macs_per_image,
    num_parameters,
    state_bytes,
    train_flops_per_image,
)
from configs.model import ModelConfig
from tests.configs.specs import vit


@pytest.mark.parametrize(
    ("variant", "fields", "parameters"),
    [
        ("B/16", {}, 86_567_656),
        ("B/32", {}, 88_224_232),
        ("L/16", {}, 304_326_632),
        ("L/32", {}, 306_535_400),
        ("H/14", {}, 632_045_800),
        ("Ti/16", {}, 5_717_416),
        ("S/16", {}, 22_050_664),
        ("S/32", {}, 22_878_952),
        ("B/16", {"head": "mlp", "num_classes": 21_843}, 103_186_515),
        ("L/16", {"head": "mlp", "num_classes": 21_843}, 326_740_307),
        ("H/14", {"head": "mlp", "num_classes": 21_843}, 660_385_363),
        ("B/16", {"image_size": 384}, 86_859_496),
        ("H/14", {"image_size": 518}, 633_470_440),
    ],
)
def test_parameters_are_exact(variant: str, fields: dict[str, Any], parameters: int) -> None:
    assert num_parameters(vit(variant, **fields)) == parameters


@pytest.mark.parametrize(
    ("variant", "fields", "parameters"),
    [
        # Those of timm's vit_base_r50_s16, vit_large_r50_s32, vit_small_r26_s32 and vit_tiny_r_s16_p8.
        ("R50+B/16", {"image_size": 384}, 98_950_952),
        ("R50+L/32", {}, 328_994_856),
        ("R26+S/32", {}, 36_431_912),
        ("R+Ti/16", {}, 6_337_704),
    ],
)
def test_parameters_of_hybrids(variant: str, fields: dict[str, Any], parameters: int) -> None:
    assert num_parameters(vit(variant, **fields)) == parameters


@pytest.mark.parametrize(("variant", "billions"), [("g/14", 1.013), ("G/14", 1.844), ("So400m/14", 0.414)])
def test_parameters_of_later_sizes(variant: str, billions: float) -> None:
    assert num_parameters(vit(variant)) / 1e9 == pytest.approx(billions, rel=0.003)


@pytest.mark.parametrize(
    ("variant", "fields", "gmacs"),
    [
        ("B/16", {}, 17.56),
        ("B/32", {}, 4.41),
        ("L/16", {}, 61.55),
        ("L/32", {}, 15.38),
        ("H/14", {}, 167.30),
        ("Ti/16", {}, 1.25),
        ("S/16", {}, 4.60),
        ("S/32", {}, 1.14),
        ("g/14", {}, 267),
        ("G/14", {}, 484),
        ("So400m/14", {}, 110),
        ("B/16", {"image_size": 384}, 55.5),
        ("H/14", {"image_size": 518}, 1016.7),
    ],
)
def test_multiply_accumulates(variant: str, fields: dict[str, Any], gmacs: float) -> None:
    assert macs_per_image(vit(variant, **fields)) / 1e9 == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize(
    ("variant", "epochs", "exaflops", "tolerance"),
    [
        ("B/32", 7, 55, 0.03),
        ("B/16", 7, 224, 0.01),
        ("L/32", 7, 196, 0.01),
        ("L/16", 7, 783, 0.01),
        ("L/16", 14, 1567, 0.01),
        ("H/14", 14, 4262, 0.01),
        ("R50+B/32", 7, 106, 0.02),
        ("R50+B/16", 7, 274, 0.01),
        ("R50+L/32", 7, 246, 0.01),
        ("R50+L/16", 14, 1668, 0.01),
        # The same model for half as long: the paper's 859 is not half of its own 1668.
        ("R50+L/16", 7, 859, 0.03),
    ],
)
def test_exaflops_of_table_6(variant: str, epochs: int, exaflops: float, tolerance: float) -> None:
    assert train_flops_per_image(vit(variant)) * 303e6 * epochs / 1e18 == pytest.approx(exaflops, rel=tolerance)


@pytest.mark.parametrize(
    ("variant", "epochs", "exaflops"),
    [
        ("R50x1", 7, 50),
        ("R50x2", 7, 199),
        ("R101x1", 7, 96),
        ("R152x1", 7, 141),
        ("R152x2", 7, 563),
        ("R152x2", 14, 1126),
        ("R200x3", 14, 3306),
    ],
)
def test_exaflops_of_table_6s_resnets(variant: str, epochs: int, exaflops: float) -> None:
    """3.5 to 5 % above the paper's figures in every row."""
    resnet = ModelConfig(variant=variant, num_classes=18_291).network()
    assert train_flops_per_image(resnet) * 303e6 * epochs / 1e18 == pytest.approx(exaflops, rel=0.06)


def test_layer_scale_adds_two_factors_per_channel_and_block() -> None:
    plain, scaled = vit("B/16"), vit("B/16", layer_scale=1e-4)
    assert num_parameters(scaled) - num_parameters(plain) == 12 * 2 * 768
    assert macs_per_image(scaled) == macs_per_image(plain)
    assert num_parameters(vit("B/16", pool="patch_mean")) == num_parameters(plain)


def test_gap_has_no_class_token() -> None:
    cls, gap = vit("B/16"), vit("B/16", pool="gap")
    assert (cls.num_tokens, gap.num_tokens) == (197, 196)
    assert num_parameters(cls) - num_parameters(gap) == 2 * 768


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pool": "gap"},
        {"pool": "patch_mean"},
        {"head": "mlp"},
        {"layer_scale": 1e-4},
        {"pool": "map", "registers": 3, "qk_norm": True},
        {"image_size": (32, 64), "in_channels": 1},
    ],
)
@pytest.mark.parametrize("variant", ["Ti/16", "R26+S/32", "R+Ti/16"])
def test_parameters_are_those_of_the_built_model(variant: str, fields: dict[str, Any]) -> None:
    from vit.model import empty

    config = vit(variant, num_classes=7, **fields)
    assert num_parameters(config) == sum(p.numel() for p in empty(config).parameters())


@pytest.mark.parametrize(
    ("optimizer", "stage", "per_parameter"),
    [
        ("adamw", 0, 16),
        ("adamw", 1, 4 + 4 + (8 + 4) / 4),
        ("adamw", 2, 4 + (4 + 8 + 4) / 4),
        ("adamw", 3, (4 + 4 + 4 + 8) / 4),
        ("sgd", 0, 12),
        ("sgd", 1, 4 + 4 + (4 + 4) / 4),
        ("sgd", 2, 4 + (4 + 4 + 4) / 4),
        ("sgd", 3, (4 + 4 + 4 + 4) / 4),
    ],
)
def test_state_of_four_workers(optimizer: str, stage: int, per_parameter: float) -> None:
    config = vit("B/16")
    found = state_bytes(config, stage, 4, optimizer)
    assert found == pytest.approx(per_parameter * num_parameters(config), rel=1e-6)


def test_checkpoints_hold_weights_and_moments() -> None:
    assert checkpoint_bytes(vit("B/16"), "adamw") == 12 * 86_567_656
    assert checkpoint_bytes(vit("B/16"), "sgd") == 8 * 86_567_656


def test_activations_grow_with_the_batch_and_shrink_with_bf16_and_checkpointing() -> None:
    config = vit("L/16")
    fp32, bf16 = activation_bytes(config, 64, "fp32"), activation_bytes(config, 64, "bf16")
    assert 0.5 < bf16 / fp32 < 0.65
    assert activation_bytes(config, 128, "fp32") == 2 * fp32
    assert activation_bytes(config, 64, "bf16", checkpointing=True) < bf16 / 4


def test_divisors_are_largest_first() -> None:
    assert list(divisors(36)) == [36, 18, 12, 9, 6, 4, 3, 2, 1]
    assert list(divisors(1)) == [1]
    assert list(divisors(7)) == [7, 1]


def test_a_micro_batch_is_the_largest_that_fits() -> None:
    config = vit("L/16")

    def chosen(memory_gib: float | None, stage: int = 1) -> int | None:
        return largest_micro_batch(
            config,
            global_batch_size=4096,
            world_sizes=(4, 8),
            zero_stage=stage,
            optimizer="adamw",
            precision="bf16",
            checkpointing=False,
            memory_gib=memory_gib,
        )

    found = chosen(80)
    assert found == 256
    state = state_bytes(config, 1, 4, "adamw")
    assert activation_bytes(config, found, "bf16") + state < 80 * GIB
    assert activation_bytes(config, 2 * found, "bf16") + state > 80 * GIB
    assert chosen(None) == 128
    assert chosen(4) is None
    assert chosen(1e6) == 512
