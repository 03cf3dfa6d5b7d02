"""Position embeddings: learned for each axis, relative and fixed ones, and resizing to another grid of patches.

Every code base has its own convention and they disagree; weights must be resized as the code they are compared with
does it. docs/models.md has the table.

    B  batch                D  embed dim
    N  tokens, the prefix   H  heads
       included             K  head dim, D / H
    P  prefix tokens
"""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import PosResize, VitConfig
from vit.init import normal_

LEARNED_STD = 0.02
"""Official for 1-D positions (`models_vit.py`, `AddPositionEmbs`); the paper does not say how it began the others."""


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


class Positions2d(nn.Module):
    """Learned positions of which one half tells the column (`x`) and one the row (`y`): the paper's 2-D positional
    embedding (D.4). Prefix tokens get 0: the paper does not say what the class token gets, and what it learns for
    itself can stand for any."""

    def __init__(self, grid: tuple[int, int], embed_dim: int, num_prefix: int) -> None:
        super().__init__()
        rows, columns = grid
        self.num_prefix = num_prefix
        self.x = nn.Parameter(torch.zeros(1, columns, embed_dim // 2))
        self.y = nn.Parameter(torch.zeros(1, rows, embed_dim // 2))

    def forward(self) -> Tensor:
        """(1, N, D), raster order."""
        rows, columns = self.y.shape[1], self.x.shape[1]
        x = self.x[:, None].expand(-1, rows, -1, -1)
        y = self.y[:, :, None].expand(-1, -1, columns, -1)
        return F.pad(torch.cat([x, y], dim=3).flatten(1, 2), (0, 0, self.num_prefix, 0))

    def init_weights(self, generator: torch.Generator) -> None:
        normal_(self.x, LEARNED_STD, generator)
        normal_(self.y, LEARNED_STD, generator)


LearnedPositions = nn.Parameter | Positions2d


def learned_positions(config: VitConfig) -> LearnedPositions:
    """One per token, (1, N, D), or `learned_2d`; zero until they are initialised."""
    if config.pos_embed == "learned_2d":
        return Positions2d(config.grid, config.embed_dim, config.num_prefix)
    return nn.Parameter(torch.zeros(1, config.num_tokens, config.embed_dim))


def add_positions(x: Tensor, positions: LearnedPositions | None) -> Tensor:
    """(B, N, D) with its positions; None adds nothing."""
    if positions is None:
        return x
    return x + (positions() if isinstance(positions, Positions2d) else positions)


def init_positions(positions: LearnedPositions | None, generator: torch.Generator) -> None:
    if isinstance(positions, Positions2d):
        positions.init_weights(generator)
    elif positions is not None:
        normal_(positions, LEARNED_STD, generator)


class RelativePositions(nn.Module):
    """A learned key for each 1-D offset of two patches in raster order: the logits that a query gives with them are
    added to those of attention, before its scale and softmax (paper, D.4).

    The paper is silent on the rest: here each block has its own keys, which its heads share, and pairs with a prefix
    token have no such logit.
    """

    def __init__(self, num_patches: int, head_dim: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(2 * num_patches - 1, head_dim))  # offset num_patches - 1 first

    def forward(self, queries: Tensor) -> Tensor:
        """Logits of the patches' queries (B, H, N - P, K), for each patch as key: (B, H, N - P, N - P)."""
        patches = queries.shape[2]
        logits = queries @ self.keys.T  # (B, H, N - P, 2 (N - P) - 1)
        if patches == 1:
            return logits
        # Query i and key j have offset i - j, which is column j - i + patches - 1. Rows one shorter put it in column j.
        skewed = logits.flatten(2)[:, :, patches - 1 : -1].unflatten(2, (patches, 2 * patches - 2))
        return skewed[..., :patches]

    def init_weights(self, generator: torch.Generator) -> None:
        normal_(self.keys, LEARNED_STD, generator)


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


def resize_axis(positions: Tensor, length: int, method: PosResize) -> Tensor:
    """One axis of `Positions2d`, (1, old length, D / 2), for another number of rows or columns, as `resize_pos_embed`
    does it."""
    if positions.shape[1] == length:
        return positions.clone()
    line = positions.float().transpose(1, 2)[:, :, None]  # (1, D / 2, 1, old length)
    resized = F.interpolate(line, size=(1, length), **METHODS[method])
    return resized[:, :, 0].transpose(1, 2).to(positions.dtype).contiguous()
