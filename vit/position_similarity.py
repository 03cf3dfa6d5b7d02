"""How alike the position embeddings of patches are (paper, 4.5 and D.4, figures 7 (centre) and 10).

N  tokens, prefix included      L  layers that have positions of their own
K  head dim                     n  patches
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.blocks import Block
from vit.model import ViT
from vit.pos_embed import LearnedPositions, Positions2d


@torch.no_grad()
def position_similarity(model: ViT) -> Tensor:
    """Cosine similarity of every patch's position embedding to those of all patches, fp32 (L, rows, columns, rows,
    columns): the tile [l, i, j] is the picture of patch (i, j). L is 1 where positions are added at the stem or shared
    by all layers, and the model's depth where every layer has its own. Prefix tokens are left out.

    Relative positions belong to two patches: the tile of patch p holds, at q, the similarity of the embedding of the
    offset p - q to that of offset 0.

    Raises:
        ValueError: the model has no position embedding.
    """
    grid = model.config.grid
    return torch.stack(_by_layer(model)).unflatten(2, grid).unflatten(1, grid)


def _by_layer(model: ViT) -> list[Tensor]:
    if model.pos_embed is not None:
        return [_similarity(model.pos_embed, model.num_prefix)]
    found = []
    for block in model.blocks:
        assert isinstance(block, Block)
        if block.pos_embed is not None:
            found.append(_similarity(block.pos_embed, model.num_prefix))
        elif block.attn.pos_embed is not None:
            found.append(_offset_similarity(block.attn.pos_embed.keys))
    if not found:
        raise ValueError(f"the model has no position embedding (pos_embed {model.config.pos_embed})")
    return found


def _similarity(positions: LearnedPositions, num_prefix: int) -> Tensor:
    """(n, n)."""
    table = positions() if isinstance(positions, Positions2d) else positions
    patches = F.normalize(table[0, num_prefix:].float(), dim=1)
    return patches @ patches.T


def _offset_similarity(keys: Tensor) -> Tensor:
    """(n, n) of one key for each offset of patches, (2 n - 1, K), the largest offset first."""
    patches = (keys.shape[0] + 1) // 2
    directions = F.normalize(keys.float(), dim=1)
    to_zero = directions @ directions[patches - 1]  # (2 n - 1,)
    index = torch.arange(patches)
    # Query p and key q have offset p - q, which is place q - p + n - 1.
    return to_zero[index[None, :] - index[:, None] + patches - 1]
