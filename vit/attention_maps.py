"""What a Vision Transformer attends to: the weights themselves, how far they reach, and which patches the output reads.

Paper, 4.5, D.7 and D.8; figures 6, 7 (right), 11 and 14.

    B  batch                     D  embed dim
    N  tokens, the prefix        H  heads
       included                  L  layers
    P  prefix tokens
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vit.blocks import Attention, Block
from vit.model import ViT

See = Callable[[int, Tensor], None]


@torch.no_grad()
def each_attention(model: ViT, images: Tensor, see: See) -> Tensor:
    """Classify `images` and show `see` the weights of every block on the way: its number from 0, and fp32 (B, H, N, N),
    query before key. Returns all tokens after the final norm, (B, N, D).

    One block's weights are held at a time: those of all of L/16 take 60 MB for each image of 224 x 224.
    """

    def show(index: int, attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(attention, Attention)
        see(index, attention.weights(inputs[0]))

    handles = []
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        handles.append(block.attn.register_forward_pre_hook(partial(show, index)))
    try:
        return model.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()


def attention_maps(model: ViT, images: Tensor) -> list[Tensor]:
    """The weights of every block, L x (B, H, N, N)."""
    maps: list[Tensor] = []
    each_attention(model, images, lambda _, weights: maps.append(weights))
    return maps


# -- how far a head looks ----------------------------------------------------------------------------------------------
def patch_distances(grid: tuple[int, int], stride: int) -> Tensor:
    """Pixels between the centres of every two patches, fp32 (rows * columns, rows * columns)."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([y, x], dim=2).reshape(-1, 2).float() * stride
    return torch.cdist(places, places)


def mean_distance(weights: Tensor, grid: tuple[int, int], stride: int, num_prefix: int) -> Tensor:
    """How far each head looks, in pixels, (B, H): the distance of a patch from every patch, itself included, weighted
    by its attention to them, and averaged over the patches (paper, D.7).

    The paper does not say what becomes of the class token, which has no place: it is left out as query and as key, and
    what is left of a patch's weights is scaled to sum to 1.
    """
    patches = weights[:, :, num_prefix:, num_prefix:]
    weighted = torch.einsum("bhqk,qk->bhq", patches, patch_distances(grid, stride).to(patches))
    total = patches.sum(dim=3).clamp_min(torch.finfo(patches.dtype).tiny)  # (B, H, N - P)
    return (weighted / total).mean(dim=2)


def uniform_distance(grid: tuple[int, int], stride: int) -> float:
    """`mean_distance` of a head that attends to all patches alike."""
    return float(patch_distances(grid, stride).mean())


# -- which patches the output reads ------------------------------------------------------------------------------------
def roll_out(rolled: Tensor | None, weights: Tensor, residual: bool) -> Tensor:
    """Attention Rollout one block further, (B, N, N): from the tokens after this block to those before the first.

    The heads' weights are averaged (paper, D.8) and multiplied onto what came before. With `residual` the block's
    shortcut is taken into account as Abnar & Zuidema (2020, arXiv 2005.00928, section 3) do: half of each token is
    itself, 0.5 A + 0.5 I, its rows scaled to sum to 1. The paper's text does not mention that.

    Args:
        rolled: the result of the block before; None for the first.
        weights: (B, H, N, N).
    """
    mixed = weights.mean(dim=1)  # (B, N, N)
    if residual:
        mixed = 0.5 * mixed + 0.5 * torch.eye(mixed.shape[1], device=mixed.device)
        mixed = mixed / mixed.sum(dim=2, keepdim=True)
    return mixed if rolled is None else mixed @ rolled


def read_out(model: ViT, features: Tensor) -> Tensor:
    """How much of each token the classifier's input is made of, fp32 (B, N): the class token; the mean of the patches
    (`pool: gap`, `patch_mean`); or what the learned query attends to, its heads averaged (`pool: map`)."""
    batch, tokens, _ = features.shape
    prefix = model.num_prefix
    share = torch.zeros(batch, tokens, device=features.device)
    if model.config.pool == "cls":
        share[:, 0] = 1.0
    elif model.attn_pool is None:
        share[:, prefix:] = 1.0 / (tokens - prefix)
    else:
        share[:, prefix:] = model.attn_pool.weights(features[:, prefix:])[:, :, 0].mean(dim=1)
    return share


@torch.no_grad()
def rollout(model: ViT, images: Tensor, *, residual: bool) -> Tensor:
    """Attention from the output to the image (paper, figure 6), fp32 (B, rows, columns): Attention Rollout through all
    blocks, read where the classifier reads. Each map sums to 1; what goes to the class token and registers is left out.
    """
    rolled: list[Tensor] = []

    def see(_: int, weights: Tensor) -> None:
        rolled[:] = [roll_out(rolled[0] if rolled else None, weights, residual)]

    features = each_attention(model, images, see)
    return rollout_map(model, features, rolled[0])


def rollout_map(model: ViT, features: Tensor, rolled: Tensor) -> Tensor:
    """What of the image the output is made of, fp32 (B, rows, columns), given the final tokens (B, N, D) and the
    `roll_out` of all blocks; each map sums to 1."""
    seen = (read_out(model, features)[:, None] @ rolled)[:, 0, model.num_prefix :]  # (B, N - P)
    seen = seen / seen.sum(dim=1, keepdim=True)
    return seen.unflatten(1, model.config.grid)
