"""Attention as it is looked at: the weights are those the model uses; distances and rollouts against arithmetic by hand
and against timm's own attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.vit.test_vit_timm import timm_model
from vit import ViT
from vit.attention_maps import (
    attention_maps,
    mean_distance,
    patch_distances,
    roll_out,
    rollout,
    uniform_distance,
)
from vit.blocks import Attention
from vit.timm_format import to_timm


def images_for(model: ViT, count: int = 2) -> Tensor:
    shape = (count, model.config.in_channels, *model.config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def timms_maps(model: ViT, images: Tensor) -> list[Tensor]:
    """The softmax weights of timm's model with the same parameters, caught where it would drop some of them out."""
    theirs = timm_model(model.config)
    theirs.load_state_dict(to_timm(model.state_dict(), model.config))
    maps: list[Tensor] = []
    for block in theirs.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: maps.append(output.detach()))
    with torch.no_grad():
        theirs(images)
    return maps


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pool": "gap", "image_size": (12, 24)},
        {"registers": 2, "qk_norm": True},
        {"pool": "patch_mean", "num_heads": 4},
        {"pool": "map"},
    ],
)
def test_the_weights_are_those_of_timms_attention(make_model: Any, fields: dict[str, object]) -> None:
    model = make_model(**fields)
    images = images_for(model)
    ours, theirs = attention_maps(model, images), timms_maps(model, images)
    assert len(ours) == len(theirs) == 3
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.shape == (2, model.config.num_heads, model.config.num_tokens, model.config.num_tokens)
        torch.testing.assert_close(mine, their, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fields", [{"pos_embed": "relative"}, {"pos_embed": "relative", "qk_norm": True}, {}])
def test_the_weights_give_what_attention_gives(make_model: Any, fields: dict[str, object]) -> None:
    model = make_model(**fields)
    attention = model.blocks[1].attn
    assert isinstance(attention, Attention)
    x = torch.randn(2, model.config.num_tokens, 16)
    with torch.no_grad():
        values = attention.qkv(x)[..., 32:].unflatten(2, (2, 8)).transpose(1, 2)
        mixed = (attention.weights(x) @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention.proj(mixed), attention(x))


def test_the_weights_of_a_pooling_query_give_what_it_pools(make_model: Any) -> None:
    model = make_model(pool="map")
    pool, x = model.attn_pool, torch.randn(3, 16, 16)
    assert pool is not None
    with torch.no_grad():
        values = pool.kv(x)[..., 16:].unflatten(2, (2, 8)).transpose(1, 2)
        pooled = pool.proj((pool.weights(x) @ values).transpose(1, 2).flatten(1))
        torch.testing.assert_close(pooled + pool.mlp(pool.norm(pooled)), pool(x))


def test_looking_changes_nothing(make_model: Any) -> None:
    model = make_model()
    images = images_for(model)
    with torch.no_grad():
        before = model(images)
    attention_maps(model, images)
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


# -- distance ----------------------------------------------------------------------------------------------------------
def test_distances_of_patches_are_in_pixels() -> None:
    found = patch_distances((2, 3), 4)
    assert found.shape == (6, 6)
    assert found[0].tolist() == pytest.approx([0, 4, 8, 4, math.hypot(4, 4), math.hypot(8, 4)], abs=1e-5)
    assert torch.equal(found, found.T)


def test_a_mean_distance_by_hand() -> None:
    # Two patches 4 pixels apart: the first looks 3/4 at the other, the second half.
    weights = torch.tensor([[[[0.25, 0.75], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]]])
    assert mean_distance(weights, (1, 2), 4, 0).tolist() == [[2.5, 0.0]]


def test_the_class_token_has_no_distance() -> None:
    """It takes half of every patch's attention here; what is left is as in the test above."""
    weights = torch.tensor([[[[0.2, 0.4, 0.4], [0.5, 0.125, 0.375], [0.5, 0.25, 0.25]]]])
    assert mean_distance(weights, (1, 2), 4, 1).tolist() == [[2.5]]
    everything = torch.tensor([[[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]])
    assert mean_distance(everything, (1, 2), 4, 1).tolist() == [[0.0]]


def test_equal_attention_is_the_mark() -> None:
    grid, stride = (3, 4), 7
    uniform = torch.full((1, 2, 12, 12), 1 / 12)
    assert mean_distance(uniform, grid, stride, 0)[0].tolist() == pytest.approx([uniform_distance(grid, stride)] * 2)
    assert uniform_distance((2, 2), 1) == pytest.approx((2 + math.sqrt(2)) / 4)


def test_a_mean_distance_is_that_of_plain_loops(make_model: Any) -> None:
    model = make_model(image_size=(12, 20), registers=1)
    (_, weights, _), prefix = attention_maps(model, images_for(model)), 2
    rows, columns = 3, 5
    expected = np.zeros((2, 2))
    for image in range(2):
        for head in range(2):
            for query in range(rows * columns):
                row = weights[image, head, prefix + query, prefix:].double().numpy()
                apart = [
                    4 * math.hypot(query // columns - key // columns, query % columns - key % columns)
                    for key in range(rows * columns)
                ]
                expected[image, head] += (row * apart).sum() / row.sum() / (rows * columns)
    assert mean_distance(weights, (rows, columns), 4, prefix).numpy() == pytest.approx(expected, rel=1e-5)


# -- rollout -----------------------------------------------------------------------------------------------------------
def test_a_rollout_by_hand() -> None:
    first = torch.tensor([[[[0.5, 0.5], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]]])  # mean: [[.5, .5], [.25, .75]]
    second = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    plain = roll_out(roll_out(None, first, False), second, False)
    assert plain.tolist() == [[[0.5, 0.5], [0.5, 0.5]]]
    # Half of each token is itself: [[.75, .25], [.125, .875]], then [[1, 0], [.5, .5]].
    kept = roll_out(roll_out(None, first, True), second, True)
    assert kept.tolist() == [[[0.75, 0.25], [0.4375, 0.5625]]]


def abnar_zuidema(maps: list[Tensor], residual: bool) -> np.ndarray:
    """As their code has it: the identity is added, rows are divided by their sums, later layers multiply from the left
    (samiraabnar/attention_flow `compute_joint_attention`)."""
    joint = None
    for layer in maps:
        matrix = layer.double().mean(dim=1).numpy()
        if residual:
            matrix = matrix + np.eye(matrix.shape[1])
            matrix = matrix / matrix.sum(axis=2, keepdims=True)
        joint = matrix if joint is None else matrix @ joint
    assert joint is not None
    return joint


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"registers": 2, "image_size": (12, 20)}, {"pool": "gap"}, {"pool": "patch_mean"}]
)
def test_a_rollout_is_that_of_timms_attention(make_model: Any, fields: dict[str, object], residual: bool) -> None:
    model = make_model(**fields)
    images, prefix = images_for(model), model.num_prefix
    joint = abnar_zuidema(timms_maps(model, images), residual)
    read = joint[:, 0] if model.config.pool == "cls" else joint[:, prefix:].mean(axis=1)
    expected = read[:, prefix:] / read[:, prefix:].sum(axis=1, keepdims=True)
    found = rollout(model, images, residual=residual)
    assert found.shape == (2, *model.config.grid)
    assert found.flatten(1).numpy() == pytest.approx(expected, abs=1e-6)
    assert found.sum(dim=(1, 2)).tolist() == pytest.approx([1.0, 1.0])


def test_a_rollout_of_a_pooling_query_begins_with_what_it_reads(make_model: Any) -> None:
    model = make_model(pool="map")
    images = images_for(model)
    joint = abnar_zuidema(attention_maps(model, images), True)
    with torch.no_grad():
        features = model.forward_features(images)
        assert model.attn_pool is not None
        read = model.attn_pool.weights(features).mean(dim=1).double().numpy()  # (B, 1, N)
    assert rollout(model, images, residual=True).flatten(1).numpy() == pytest.approx((read @ joint)[:, 0], abs=1e-6)
