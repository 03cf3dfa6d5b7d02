"""The Vision Transformer of "An Image is Worth 16x16 Words": architecture only.

Numerics follow google-research/vision_transformer `vit_jax/models_vit.py` (pre-LN, LayerNorm eps 1e-6, tanh GELU);
parameter names follow timm.

    B  batch                     D  embed dim
    N  tokens, the prefix        H  heads
       included                  K  head dim, D / H
    P  prefix tokens             C  classes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.model import BitConfig, DropPathRule, StemConfig, VitConfig, stride_text
from configs.wire import Preprocess
from vit.bit import BiT
from vit.blocks import LAYER_NORM_EPS, AttentionPool, Block, init_norm
from vit.init import lecun_normal_, normal_
from vit.pos_embed import add_positions, init_positions, learned_positions, sincos2d
from vit.resnet import OFFICIAL_HYBRID, TIMM_HYBRID, ResNetBackbone


class PatchEmbed(nn.Module):
    """Projects each patch, in raster order: (B, channels, height, width) -> (B, rows * columns, D). A hybrid's patches
    are cut from the feature map of its `backbone` (paper, 3.1)."""

    def __init__(
        self, *, patch_size: int, in_channels: int, embed_dim: int, backbone: ResNetBackbone | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        channels = backbone.num_features if backbone is not None else in_channels
        self.proj = nn.Conv2d(channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        x = images if self.backbone is None else self.backbone(images)
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, rows * columns, D)

    def init_weights(self, generator: torch.Generator) -> None:
        if self.backbone is not None:
            self.backbone.init_weights(generator)
        lecun_normal_(self.proj.weight, generator)
        nn.init.zeros_(_bias(self.proj))


class ViT(nn.Module):
    """A Vision Transformer of any size, of image patches or (`stem`) of a convolutional feature map.

    `pool: cls` prepends a class token and reads it; `pool: gap` has none and reads the mean of all patches after the
    final norm (google-research/big_vision); `pool: map` has none and lets a learned query attend to the patches after
    the final norm (big_vision); `pool: patch_mean` prepends one and reads the mean of the patches, and the final norm,
    then called `fc_norm`, comes after the mean (facebookresearch/mae fine-tuning). `registers` follow the class token.
    `head: mlp` puts a D x D layer with tanh before the classifier. `head: masked_patch` has no classifier: it tells the
    mean colour of each patch (`vit.masked`).
    Its weights are torch's defaults until `init_weights`; `build` makes an initialised one.

    Raises:
        ValueError: embed_dim is not a multiple of num_heads, or image_size not of patch_size.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        _check_sizes(config)
        self.config = config
        self.preprocess: Preprocess | None = None
        """How images are prepared for these weights; set by `vit.load`."""
        self.activation_checkpointing = False
        self.num_prefix = config.num_prefix
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            embed_dim=dim,
            backbone=None if config.stem is None else _backbone(config.stem, config.in_channels),
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.has_cls_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, dim)) if config.registers else None
        self.mask_token = None if config.has_classifier else nn.Parameter(torch.zeros(1, 1, dim))
        has_table = config.pos_embed not in ("none", "relative") and config.pos_embed_at != "every_layer"
        self.pos_embed = learned_positions(config) if has_table else None
        if config.pos_embed == "sincos2d" and self.pos_embed is not None:
            # Fixed positions are a weight too, so that files hold them as timm's do; nothing ever trains them.
            self.pos_embed.requires_grad_(False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, rate) for rate in drop_path_rates(config.drop_path, config.depth, config.drop_path_rule)
        )
        is_pooled_first = config.pool == "patch_mean"
        self.norm = nn.Identity() if is_pooled_first else nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn_pool = AttentionPool(config) if config.pool == "map" else None
        self.fc_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS) if is_pooled_first else nn.Identity()
        self.pre_logits = nn.Linear(dim, dim) if config.head == "mlp" else None
        self.head = nn.Linear(dim, config.num_classes)

    def forward(self, images: Tensor, representation: bool = False, sources: Tensor | None = None) -> Tensor:
        """Logits, (B, C), of normalised float images (B, channels, height, width), or with `head: masked_patch` of
        every patch, (B, rows * columns, C); or the (B, D) vector that the classifier reads. `sources` corrupts
        patches, as in `forward_features`."""
        features = self.forward_features(images, sources)
        return self.forward_representation(features) if representation else self.forward_head(features)

    def forward_features(self, images: Tensor, sources: Tensor | None = None) -> Tensor:
        """All tokens after the final norm (`pool: patch_mean`: before it), (B, N, D); the class token, if any, is the
        first, then come the registers.

        Args:
            sources: with `head: masked_patch`, the patch whose embedding stands at each place, int64
                (B, rows * columns); the number of patches stands for the [mask] (`vit.masked.Corruption`).

        Raises:
            ValueError: the images' channels or size are not those of the configuration.
        """
        x = self._embed(images, sources)
        for index, block in enumerate(self.blocks):
            x = self._run(block, x, index)
        return self.norm(x)

    def forward_intermediates(self, images: Tensor, indices: Sequence[int], norm: bool = False) -> list[Tensor]:
        """What the blocks of these numbers give, in the order of the blocks, as feature maps (B, D, rows, columns):
        the patches' tokens, without the prefix. Blocks after the last one are not run.

        Args:
            indices: numbers of blocks; negative ones count from the last.
            norm: the final norm is applied to each (with `pool: patch_mean` there is none before pooling).

        Raises:
            ValueError: no or an unknown block is named, or the images are not those of `forward_features`.
        """
        depth = len(self.blocks)
        wanted = {index + depth if index < 0 else index for index in indices}
        if not wanted or min(wanted) < 0 or max(wanted) >= depth:
            raise ValueError(f"indices {list(indices)}: expected at least one of {-depth} to {depth - 1}")
        rows, columns = self.config.grid
        maps = []
        x = self._embed(images)
        for index, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = self._run(block, x, index)
            if index in wanted:
                tokens = (self.norm(x) if norm else x)[:, self.num_prefix :]  # (B, rows * columns, D)
                maps.append(tokens.transpose(1, 2).unflatten(2, (rows, columns)).contiguous())
        return maps

    def forward_representation(self, features: Tensor) -> Tensor:
        """The vector that the classifier reads, (B, D), of the tokens that `forward_features` gives: pooled, and with
        `head: mlp` after its hidden layer and tanh."""
        x = self.fc_norm(self._pool(features))
        return x if self.pre_logits is None else torch.tanh(self.pre_logits(x))

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits, (B, C), of the tokens that `forward_features` gives; with `head: masked_patch`
        (B, rows * columns, C), of the patches."""
        if not self.config.has_classifier:
            return self.head(features[:, self.num_prefix :])
        return self.head(self.forward_representation(features))

    def _pool(self, features: Tensor) -> Tensor:
        if self.config.pool == "cls":
            return features[:, 0]
        patches = features[:, self.num_prefix :]
        return patches.mean(dim=1) if self.attn_pool is None else self.attn_pool(patches)

    def _embed(self, images: Tensor, sources: Tensor | None = None) -> Tensor:
        """The tokens that the first block reads, (B, N, D)."""
        expected = (self.config.in_channels, *self.config.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images have shape {tuple(images.shape[1:])} each, this model takes {expected}")
        x = self.patch_embed(images)  # (B, N - P, D)
        # The residual stream is fp32 from here on, also where nothing in fp32 is added to what autocast gives.
        x = x.float() if x.dtype is torch.bfloat16 else x
        if sources is not None:
            assert self.mask_token is not None, "only head masked_patch is trained on corrupted patches"
            patches = x.shape[1]
            placed = x.gather(1, sources.clamp(max=patches - 1).unsqueeze(2).expand_as(x))
            x = torch.where((sources == patches).unsqueeze(2), self.mask_token, placed)  # (B, N - P, D)
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = torch.cat([*prefix, x], dim=1) if prefix else x  # (B, N, D)
        return self.dropout(add_positions(x, self.pos_embed))

    def _run(self, block: nn.Module, x: Tensor, index: int) -> Tensor:
        if index > 0 and self.config.pos_embed_at == "every_layer_shared":
            x = add_positions(x, self.pos_embed)
        if self.activation_checkpointing and self.training:
            # Dropout must draw the same mask again when the block is recomputed in the backward pass.
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=True)
        return block(x)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations (training only)."""
        self.activation_checkpointing = enabled
        if self.patch_embed.backbone is not None:
            self.patch_embed.backbone.activation_checkpointing = enabled

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Set every parameter as the official code does; the head's kernel is zero, so all logits are its bias."""
        self.patch_embed.init_weights(generator)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        if self.reg_token is not None:
            normal_(self.reg_token, 1e-6, generator)
        if self.mask_token is not None:
            normal_(self.mask_token, 0.02, generator)  # the paper does not say; as BERT, BEiT and MAE do
        if self.config.pos_embed == "sincos2d":
            assert isinstance(self.pos_embed, nn.Parameter)
            self.pos_embed.copy_(sincos2d(self.config.grid, self.config.embed_dim, self.num_prefix))
        else:
            init_positions(self.pos_embed, generator)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.init_weights(generator)
        for norm in (self.norm, self.fc_norm):
            if isinstance(norm, nn.LayerNorm):
                init_norm(norm)
        if self.attn_pool is not None:
            self.attn_pool.init_weights(generator)
        if self.pre_logits is not None:
            lecun_normal_(self.pre_logits.weight, generator)
            nn.init.zeros_(self.pre_logits.bias)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, self.config.head_bias_init)


Network = ViT | BiT


@overload
def build(config: VitConfig, seed: int = 0) -> ViT: ...
@overload
def build(config: BitConfig, seed: int = 0) -> BiT: ...
def build(config: VitConfig | BitConfig, seed: int = 0) -> Network:
    """A model on the CPU in fp32, initialised as the official code does: a pure function of its arguments, equal on
    every rank. The global random state is neither read nor changed."""
    model = empty(config).to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


@overload
def empty(config: VitConfig) -> ViT: ...
@overload
def empty(config: BitConfig) -> BiT: ...
def empty(config: VitConfig | BitConfig) -> Network:
    """The model without storage (meta device): names, shapes and counts of any size at no cost."""
    with torch.device("meta"):
        return BiT(config) if isinstance(config, BitConfig) else ViT(config)


def drop_path_rates(rate: float, depth: int, rule: DropPathRule = "linear") -> list[float]:
    """Drop rate of each block: linear from 0 at the first to `rate` at the last, or `rate` in all of them."""
    if rule == "uniform":
        return [rate] * depth
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def _check_sizes(config: VitConfig) -> None:
    if config.embed_dim % config.num_heads:
        raise ValueError(f"embed_dim {config.embed_dim} is not a multiple of num_heads {config.num_heads}")
    for side in config.image_size:
        if side % config.stride:
            raise ValueError(f"image_size {side} is not a multiple of {stride_text(config)}")


def _backbone(stem: StemConfig, in_channels: int) -> ResNetBackbone:
    style = OFFICIAL_HYBRID if stem.numerics == "official" else TIMM_HYBRID
    return ResNetBackbone(stem.layers, width=stem.width, in_channels=in_channels, preact=False, style=style)


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
