"""Position embeddings: the fixed ones, and resizing of learned ones to another grid of patches.

Every code base has its own convention and they disagree; weights must be resized as the code they are compared with
does it. docs/models.md has the table.

    P  prefix tokens (class token)    D  embed dim
"""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.model import PosResize


class _Interpolation(TypedDict):
    mode: str
    align_corners: bool
    antialias: bool


METHODS: dict[PosResize, _Interpolation] = {
    # google-research/vision_transformer and big_vision: scipy.ndimage.zoom(order=1), whose corners are aligned.
    "official": {"mode": "bilinear", "align_corners": True, "antialias": False},
    # timm, import of .npz files.
    "bilinear": {"mode": "bilinear", "align_corners": False, "antialias": False},
    # Transformers, interpolate_pos_encoding.
    "bicubic": {"mode": "bicubic", "align_corners": False, "antialias": False},
    # timm, state dicts and set_input_size.
    "bicubic_antialias": {"mode": "bicubic", "align_corners": False, "antialias": True},
    # torchvision, interpolate_embeddings.
    "bicubic_aligned": {"mode": "bicubic", "align_corners": True, "antialias": False},
}


def sincos2d(grid: tuple[int, int], embed_dim: int, num_prefix: int) -> Tensor:
    """Fixed positions, fp32 (1, P + rows * columns, D): sin x, cos x, sin y, cos y, a quarter of D each, at wavelengths
    from 2 pi to 10000 * 2 pi (google-research/big_vision `models/vit.py`, `posemb_sincos_2d`). Prefix tokens get 0."""
    rows, columns = grid
    quarter = embed_dim // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, x = (side.reshape(-1, 1).double() * omega for side in (y, x))  # (rows * columns, D / 4)
    patches = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()
    return torch.cat([torch.zeros(num_prefix, embed_dim), patches])[None]


def resize_pos_embed(
    pos: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int, method: PosResize
) -> Tensor:
    """Position embeddings for `new_grid` (rows, columns), (1, P + new rows * new columns, D), in the dtype of `pos`.

    Prefix tokens are kept as they are. Interpolates in fp32 to an explicit size (a scale factor rounds to grids that
    are off by one). Equal grids give an equal copy.

    Args:
        pos: (1, P + rows * columns, D), raster order, prefix first.

    Raises:
        ValueError: `pos` does not have `num_prefix` + rows * columns tokens.
    """
    rows, columns = old_grid
    if pos.ndim != 3 or pos.shape[0] != 1 or pos.shape[1] != num_prefix + rows * columns:
        raise ValueError(
            f"pos_embed has shape {tuple(pos.shape)}, expected (1, {num_prefix + rows * columns}, D) "
            f"for {num_prefix} prefix tokens and a grid of {rows} x {columns}"
        )
    if old_grid == new_grid:
        return pos.clone()
    prefix, patches = pos[:, :num_prefix], pos[:, num_prefix:]
    image = patches.float().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    image = F.interpolate(image, size=new_grid, **METHODS[method])
    patches = image.permute(0, 2, 3, 1).flatten(1, 2).to(pos.dtype)  # (1, new rows * new columns, D)
    return torch.cat([prefix, patches], dim=1)
