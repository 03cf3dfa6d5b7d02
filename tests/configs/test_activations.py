"""The activation model against what autograd really saves on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from configs.cost import Precision, saved_bytes_outside_blocks, saved_bytes_per_block, weight_copy_bytes
from configs.model import VitConfig
from vit import build
from vit.losses import classification_loss
from vit.masked import draw_corruption, masked_patch_loss

SIZES: dict[str, Any] = {
    "patch_size": 16,
    "embed_dim": 192,
    "depth": 3,
    "num_heads": 3,
    "mlp_dim": 768,
    "image_size": (112, 96),
    "num_classes": 50,
}


def saved_bytes(config: VitConfig, batch: int, precision: Precision, *, checkpointing: bool = False) -> int:
    """Bytes of all distinct storages that autograd keeps for the backward pass, the parameters' own left out."""
    model = build(config).train()
    model.set_activation_checkpointing(checkpointing)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    images = torch.randn(batch, config.in_channels, *config.image_size)
    labels = torch.zeros(batch, dtype=torch.int64)
    rows, columns = config.grid
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        if config.has_classifier:
            classification_loss(model(images), labels, "softmax")
        else:
            corruption = draw_corruption(batch, rows * columns)
            logits = model(images, sources=corruption.sources)
            masked_patch_loss(logits, torch.zeros(batch, rows * columns, dtype=torch.int64), corruption.chosen)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def modelled_bytes(config: VitConfig, batch: int, precision: Precision) -> int:
    per_image = config.depth * saved_bytes_per_block(config, precision) + saved_bytes_outside_blocks(config, precision)
    return batch * per_image + weight_copy_bytes(config, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"head": "mlp"},
        {"pool": "gap"},
        {"pool": "patch_mean"},
        {"layer_scale": 1e-4},
        {"gelu": "exact"},
        {"num_heads": 6},
        {"pool": "map"},
        {"registers": 4},
        {"qk_norm": True},
        {"qk_norm": True, "pos_embed": "relative"},
        {"pos_embed": "learned_2d", "pos_embed_at": "every_layer"},
        {"pos_embed": "learned", "pos_embed_at": "every_layer_shared"},
        {"pos_embed": "relative"},
        {"pos_embed": "relative", "pool": "gap"},
        {"patch_size": 1, "stem": {"layers": (2, 1, 1), "width": 32}},
        {"patch_size": 4, "stem": {"layers": (), "width": 32}},
        {"head": "masked_patch", "num_classes": 512},
        {"head": "masked_patch", "num_classes": 512, "pool": "gap", "registers": 1},
    ],
)
def test_what_autograd_saves(precision: Precision, fields: dict[str, Any]) -> None:
    config = VitConfig.model_validate(SIZES | fields)
    assert saved_bytes(config, 4, precision) == pytest.approx(modelled_bytes(config, 4, precision), rel=0.005)


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_dropout_saves_one_mask_element_where_the_model_says(precision: Precision, width: int) -> None:
    plain = VitConfig.model_validate(SIZES)
    dropout = VitConfig.model_validate(SIZES | {"dropout": 0.1})
    elements = modelled_bytes(dropout, 4, precision) - modelled_bytes(plain, 4, precision)
    found = saved_bytes(dropout, 4, precision) - saved_bytes(plain, 4, precision)
    # Masks are as wide as activations on the CPU; the one after the position embedding is fp32 like its input.
    stem = 4 * plain.num_tokens * plain.embed_dim
    assert found == pytest.approx((elements - stem) * width + stem * 4, rel=0.01)


def test_checkpointing_saves_each_blocks_input() -> None:
    config = VitConfig.model_validate(SIZES)
    outside = 4 * saved_bytes_outside_blocks(config, "fp32")
    inputs = 4 * config.depth * config.num_tokens * config.embed_dim * 4
    assert saved_bytes(config, 4, "fp32", checkpointing=True) == pytest.approx(inputs + outside, rel=0.02)
