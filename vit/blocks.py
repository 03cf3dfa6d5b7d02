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
        self.q_norm, self.k_norm = (HeadNorm(config.head_dim) if config.qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)
        rows, columns = config.grid
        is_relative = config.pos_embed == "relative"
        self.pos_embed = RelativePositions(rows * columns, config.head_dim) if is_relative else None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, embed_dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, embed_dim // self.num_heads)
        if self.pos_embed is None:
            q, k, v = qkv.unbind(2)  # 3 x (B, N, H, K)
            q, k = self.q_norm(q), self.k_norm(k)
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, K), scaled by 1 / sqrt(K)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)  # 3 x (B, H, N, K)
            x = self._relative_attention(self.q_norm(q), self.k_norm(k), v, self.pos_embed)
        x = x.transpose(1, 2).reshape(batch, tokens, embed_dim)
        return self.dropout(self.proj(x))

    def _relative_attention(self, q: Tensor, k: Tensor, v: Tensor, positions: RelativePositions) -> Tensor:
        """Written out: fused kernels take no additional logits that are trained, or keep them as well."""
        logits = (q @ k.transpose(2, 3) + self._offset_logits(q, positions)) / math.sqrt(q.shape[3])  # (B, H, N, N)
        return logits.softmax(dim=3, dtype=torch.float32).to(v.dtype) @ v

    def _offset_logits(self, q: Tensor, positions: RelativePositions) -> Tensor:
        """(B, H, N, N); 0 for pairs with a prefix token."""
        return F.pad(positions(q[:, :, self.num_prefix :]), (self.num_prefix, 0, self.num_prefix, 0))

    def weights(self, x: Tensor) -> Tensor:
        """The softmax weights that `forward` applies to the values, fp32 (B, H, N, N): each query's row sums to 1. To
        look at: nothing here is fused."""
        batch, tokens, _ = x.shape
        q, k, _ = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)  # 2 x (B, H, N, K)
        logits = q @ k.transpose(2, 3)
        if self.pos_embed is not None:
            logits = logits + self._offset_logits(q, self.pos_embed)
        return (logits / math.sqrt(q.shape[3])).softmax(dim=3, dtype=torch.float32)

    def init_weights(self, generator: torch.Generator) -> None:
        for kernel in self.qkv.weight.chunk(3):
            xavier_uniform_(kernel, generator)
        xavier_uniform_(self.proj.weight, generator)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, nn.LayerNorm):
                init_norm(norm)
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


class AttentionPool(nn.Module):
    """One learned query attends to the patches, then an MLP beside it: (B, N - P, D) -> (B, D)
    (google-research/big_vision `models/vit.py`, `MAPHead`). No dropout."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(config.model_copy(update={"dropout": 0.0}))

    def forward(self, x: Tensor) -> Tensor:
        batch, patches, embed_dim = x.shape
        q = self.q(self.latent).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (1, H, 1, K)
        kv = self.kv(x).reshape(batch, patches, 2, self.num_heads, embed_dim // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # 2 x (B, H, N - P, K)
        x = F.scaled_dot_product_attention(q.expand(batch, -1, -1, -1), k, v)  # (B, H, 1, K)
        x = self.proj(x.transpose(1, 2).reshape(batch, embed_dim))
        return x + self.mlp(self.norm(x))

    def weights(self, x: Tensor) -> Tensor:
        """The softmax weights of the learned query on the patches, fp32 (B, H, 1, N - P)."""
        q = self.q(self.latent).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (1, H, 1, K)
        k = self.kv(x).chunk(2, dim=2)[0].unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N - P, K)
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3, dtype=torch.float32)

    def init_weights(self, generator: torch.Generator) -> None:
        xavier_uniform_(self.latent[0], generator)
        for kernel in (self.q.weight, *self.kv.weight.chunk(2), self.proj.weight):
            xavier_uniform_(kernel, generator)
        for bias in (self.q.bias, self.kv.bias, self.proj.bias):
            nn.init.zeros_(bias)
        init_norm(self.norm)
        self.mlp.init_weights(generator)


class HeadNorm(nn.LayerNorm):
    """Normalises each head's queries or keys, (..., K): in fp32 whatever autocast says, its result in their own type,
    which attention reads. CUDA's autocast computes it so by itself, the CPU's would not."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() if x.dtype is torch.bfloat16 else x).to(x.dtype)


def init_norm(norm: nn.LayerNorm) -> None:
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
