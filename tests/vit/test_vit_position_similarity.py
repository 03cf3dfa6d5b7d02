"""Similarity of position embeddings of every kind, against torch's cosine similarity pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vit.pos_embed import sincos2d
from vit.position_similarity import position_similarity

GRID = (2, 3)
SIZE = (8, 12)


def pair_by_pair(table: Tensor) -> Tensor:
    """(rows, columns, rows, columns) of (rows * columns, D)."""
    table = table.detach()
    found = torch.tensor([[float(F.cosine_similarity(p, q, dim=0)) for q in table] for p in table])
    return found.reshape(*GRID, *GRID)


def test_learned_positions_are_compared_without_the_prefix(make_model: Any) -> None:
    model = make_model(image_size=SIZE, registers=2)
    found = position_similarity(model)
    assert found.shape == (1, *GRID, *GRID)
    torch.testing.assert_close(found[0], pair_by_pair(model.pos_embed[0, 3:]))


def test_halves_of_learned_2d_make_rows_and_columns_alike(make_model: Any) -> None:
    model = make_model(image_size=SIZE, pos_embed="learned_2d")
    x, y = model.pos_embed.x[0], model.pos_embed.y[0]
    table = torch.stack([torch.cat([x[column], y[row]]) for row in range(2) for column in range(3)])
    torch.testing.assert_close(position_similarity(model)[0], pair_by_pair(table))


def test_every_layer_has_a_picture_of_its_own(make_model: Any) -> None:
    model = make_model(image_size=SIZE, pos_embed_at="every_layer")
    found = position_similarity(model)
    assert found.shape == (3, *GRID, *GRID)
    for layer, block in enumerate(model.blocks):
        torch.testing.assert_close(found[layer], pair_by_pair(block.pos_embed[0, 1:]))
    shared = make_model(image_size=SIZE, pos_embed_at="every_layer_shared")
    assert position_similarity(shared).shape == (1, *GRID, *GRID)


def test_fixed_positions_have_a_picture_too(make_model: Any) -> None:
    model = make_model(image_size=SIZE, pos_embed="sincos2d", pool="gap")
    model.pos_embed.data.copy_(sincos2d(GRID, 16, 0))
    torch.testing.assert_close(position_similarity(model)[0], pair_by_pair(sincos2d(GRID, 16, 0)[0]))


def test_relative_positions_are_compared_with_offset_0(make_model: Any) -> None:
    model = make_model(image_size=SIZE, pos_embed="relative")
    found = position_similarity(model)
    assert found.shape == (3, *GRID, *GRID)
    for layer, block in enumerate(model.blocks):
        keys = block.attn.pos_embed.keys  # offset 5 first, -5 last
        for p in range(6):
            for q in range(6):
                expected = F.cosine_similarity(keys[5 - (p - q)], keys[5], dim=0)
                assert found[layer, p // 3, p % 3, q // 3, q % 3].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_model_without_positions_has_none(make_model: Any) -> None:
    with pytest.raises(ValueError, match="no position embedding"):
        position_similarity(make_model(pos_embed="none"))
