from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import PosResize
from vit import build
from vit.pos_embed import METHODS, resize_pos_embed, sincos2d
from vit.transfer import transfer_weights

METHOD_NAMES = get_args(PosResize)
GRIDS = [((4, 4), (6, 6)), ((6, 6), (4, 4)), ((3, 5), (7, 4)), ((4, 4), (1, 9)), ((1, 3), (2, 6))]


def random_positions(grid: tuple[int, int], num_prefix: int, dim: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, num_prefix + grid[0] * grid[1], dim, generator=generator)


def bilinear_corners_aligned(image: Tensor, new_rows: int, new_columns: int) -> Tensor:
    """(rows, columns, D), written out: the first and last sample points lie on the first and last grid points."""
    rows, columns, dim = image.shape
    out = torch.empty(new_rows, new_columns, dim, dtype=torch.float64)
    for i in range(new_rows):
        for j in range(new_columns):
            y = i * (rows - 1) / (new_rows - 1) if new_rows > 1 else 0.0
            x = j * (columns - 1) / (new_columns - 1) if new_columns > 1 else 0.0
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            dy, dx = y - top, x - left
            upper = image[top, left] * (1 - dx) + image[top, right] * dx
            lower = image[bottom, left] * (1 - dx) + image[bottom, right] * dx
            out[i, j] = upper * (1 - dy) + lower * dy
    return out


@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_official_is_bilinear_with_aligned_corners(old, new, num_prefix) -> None:
    pos = random_positions(old, num_prefix)
    resized = resize_pos_embed(pos, old, new, num_prefix, "official")
    expected = bilinear_corners_aligned(pos[0, num_prefix:].double().reshape(*old, -1), *new).flatten(0, 1)
    torch.testing.assert_close(resized[0, num_prefix:].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_bicubic_antialias_is_timms(old, new, num_prefix) -> None:
    from timm.layers import resample_abs_pos_embed

    pos = random_positions(old, num_prefix)
    expected = resample_abs_pos_embed(pos, list(new), list(old), num_prefix_tokens=num_prefix)
    torch.testing.assert_close(resize_pos_embed(pos, old, new, num_prefix, "bicubic_antialias"), expected)


@pytest.mark.parametrize(("side", "new_side"), [(4, 6), (6, 4), (7, 8)])
def test_bicubic_aligned_is_torchvisions(side: int, new_side: int) -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings

    pos = random_positions((side, side), 1)
    state = interpolate_embeddings(new_side * 16, 16, {"encoder.pos_embedding": pos})
    resized = resize_pos_embed(pos, (side, side), (new_side, new_side), 1, "bicubic_aligned")
    torch.testing.assert_close(resized, state["encoder.pos_embedding"])


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_the_others_sample_pixel_centres_without_antialias(method) -> None:
    pos = random_positions((6, 4), 1)
    image = pos[:, 1:].reshape(1, 6, 4, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=(3, 9), mode=method, align_corners=False, antialias=False)
    resized = resize_pos_embed(pos, (6, 4), (3, 9), 1, method)
    torch.testing.assert_close(resized[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 27, 5))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_prefix_is_untouched_dtype_kept_and_equal_grids_are_the_identity(method) -> None:
    pos = random_positions((3, 5), 1).bfloat16()
    resized = resize_pos_embed(pos, (3, 5), (5, 3), 1, method)
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized[:, :1], pos[:, :1])
    same = resize_pos_embed(pos, (3, 5), (3, 5), 1, method)
    assert torch.equal(same, pos)
    assert same.data_ptr() != pos.data_ptr()


def test_interpolation_is_done_in_fp32() -> None:
    pos = random_positions((4, 4), 0)
    low = resize_pos_embed(pos.bfloat16(), (4, 4), (7, 7), 0, "official")
    exact = resize_pos_embed(pos.bfloat16().float(), (4, 4), (7, 7), 0, "official")
    assert torch.equal(low, exact.bfloat16())


def test_every_method_is_another_function() -> None:
    assert set(METHODS) == set(METHOD_NAMES)
    pos = random_positions((6, 6), 0)
    shrunk = [resize_pos_embed(pos, (6, 6), (4, 4), 0, method) for method in METHOD_NAMES]
    for i, first in enumerate(shrunk):
        assert all(not torch.allclose(first, second) for second in shrunk[i + 1 :])


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_sizes_of_the_paper_are_exact(method) -> None:
    pos = random_positions((14, 14), 1, dim=2)
    assert resize_pos_embed(pos, (14, 14), (24, 24), 1, method).shape == (1, 577, 2)
    assert resize_pos_embed(pos, (14, 14), (37, 37), 1, method).shape == (1, 1370, 2)


def test_wrong_number_of_tokens_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 17, 5\), expected \(1, 16, D\) for 0 prefix tokens"):
        resize_pos_embed(random_positions((4, 4), 1), (4, 4), (5, 5), 0, "official")


@pytest.mark.parametrize(("grid", "embed_dim"), [((14, 14), 384), ((2, 3), 8)])
def test_sincos2d_is_big_visions(grid: tuple[int, int], embed_dim: int) -> None:
    """`posemb_sincos_2d` of big_vision's models/vit.py, in NumPy."""
    y, x = np.mgrid[: grid[0], : grid[1]]
    omega = np.arange(embed_dim // 4) / (embed_dim // 4 - 1)
    omega = 1.0 / (10_000.0**omega)
    y, x = np.einsum("m,d->md", y.flatten(), omega), np.einsum("m,d->md", x.flatten(), omega)
    expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    found = sincos2d(grid, embed_dim, 0)
    assert found.shape == (1, grid[0] * grid[1], embed_dim)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)
    with_prefix = sincos2d(grid, embed_dim, 1)
    assert not with_prefix[0, 0].any()
    assert torch.equal(with_prefix[:, 1:], found)


def test_fixed_positions_follow_the_resolution(make_config) -> None:
    """They are computed anew, not interpolated."""
    small, large = make_config(pos_embed="sincos2d"), make_config(pos_embed="sincos2d", image_size=(24, 32))
    moved = transfer_weights(build(small).state_dict(), small, large)
    assert torch.equal(moved["pos_embed"], build(large).state_dict()["pos_embed"])


def test_head_bias_starts_where_it_is_told(make_config) -> None:
    model = build(make_config(head_bias_init=-6.9))
    assert torch.equal(model.head.bias, torch.full((7,), -6.9))
    assert torch.equal(model(torch.randn(2, 3, 16, 16)), torch.full((2, 7), -6.9))
