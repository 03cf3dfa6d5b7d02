"""The Transformer's block: attention, MLP, stochastic depth, LayerScale. Names of parameters follow timm.

B  batch                     D  embed dim
N  tokens, the prefix        H  heads
   included                  K  head dim, D / H
P  prefix tokens
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import VitConfig
from vit.init import normal_, xavier_uniform_
from vit.pos_embed import RelativePositions, add_positions, init_positions, learned_positions

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D). Dropout after the output projection, none on the weights."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.num_prefix = config.num_prefix
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)
        rows, columns = config.grid
        is_relative = config.pos_embed == "relative"
        self.pos_embed = RelativePositions(rows * columns, config.head_dim) if is_relative else None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, embed_dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, embed_dim // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, N, K)
        if self.pos_embed is None:
            q, k, v = qkv.unbind(0)
            x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, K), scaled by 1 / sqrt(K)
        else:
            q, k, v = qkv.contiguous().unbind(0)
            x = self._relative_attention(q, k, v, self.pos_embed)
        x = x.transpose(1, 2).reshape(batch, tokens, embed_dim)
        return self.dropout(self.proj(x))

    def _relative_attention(self, q: Tensor, k: Tensor, v: Tensor, positions: RelativePositions) -> Tensor:
        """Written out: fused kernels take no additional logits that are trained, or keep them as well."""
        extra = F.pad(positions(q[:, :, self.num_prefix :]), (self.num_prefix, 0, self.num_prefix, 0))
        logits = (q @ k.transpose(2, 3) + extra) / math.sqrt(q.shape[3])  # (B, H, N, N)
        return logits.softmax(dim=3, dtype=torch.float32).to(v.dtype) @ v

    def init_weights(self, generator: torch.Generator) -> None:
        for kernel in self.qkv.weight.chunk(3):
            xavier_uniform_(kernel, generator)
        xavier_uniform_(self.proj.weight, generator)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)
        if self.pos_embed is not None:
            self.pos_embed.init_weights(generator)


class Mlp(nn.Module):
    """Two dense layers with GELU, (B, N, D) -> (B, N, D). Dropout after each."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
        self.act = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.act(self.fc1(x)))  # (B, N, mlp_dim)
        return self.dropout(self.fc2(x))

    def init_weights(self, generator: torch.Generator) -> None:
        for layer in (self.fc1, self.fc2):
            xavier_uniform_(layer.weight, generator)
            normal_(layer.bias, 1e-6, generator)


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes a residual branch for whole samples and scales the others by
    1 / (1 - rate), so that the expectation is unchanged (timm's convention)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = torch.empty(x.shape[0], 1, 1, device=x.device).bernoulli_(keep)  # (B, 1, 1)
        return (x * (mask / keep)).to(x.dtype)  # 1 / keep in fp32: rounded to bf16 it would bias the branch


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch, all of them `init` at the start (CaiT, arXiv
    2103.17239)."""

    def __init__(self, embed_dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((embed_dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

    def init_weights(self) -> None:
        nn.init.constant_(self.gamma, self.init)


class Block(nn.Module):
    """z' = MSA(LN(z)) + z; z = MLP(LN(z')) + z' (paper, equations 2 and 3). LayerScale, if there is one, multiplies
    what each branch adds. With `pos_embed_at: every_layer` the block first adds positions of its own."""

    def __init__(self, config: VitConfig, drop_path: float) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.layer_scale
        self.pos_embed = learned_positions(config) if config.pos_embed_at == "every_layer" else None
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(config)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(config)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = add_positions(x, self.pos_embed)
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))

    def init_weights(self, generator: torch.Generator) -> None:
        init_positions(self.pos_embed, generator)
        init_norm(self.norm1)
        self.attn.init_weights(generator)
        init_norm(self.norm2)
        self.mlp.init_weights(generator)
        for scale in (self.ls1, self.ls2):
            if isinstance(scale, LayerScale):
                scale.init_weights()


def init_norm(norm: nn.LayerNorm) -> None:
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
