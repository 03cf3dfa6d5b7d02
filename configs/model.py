"""The model part of a job description, and the complete model configuration stored with every checkpoint.

Sizes follow Table 1 of "An Image is Worth 16x16 Words" (B, L, H) and google-research/big_vision `models/vit.py`
(Ti, S, g, G, So400m).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator

from configs.base import Strict

Size = Annotated[int, Field(ge=1, le=65536)]
ImageSize = Annotated[int, Field(ge=1, le=4096)]
Head = Literal["linear", "mlp", "masked_patch"]
NUM_LEVELS = 8
"""Of each channel of a patch's mean colour, which masked patch prediction tells: 3 bits (paper, B.1.2)."""
Pool = Literal["cls", "gap", "patch_mean", "map"]
Registers = Annotated[int, Field(ge=0, le=16)]
DropPathRule = Literal["linear", "uniform"]
LayerScale = Annotated[float, Field(gt=0.0, le=1.0)]
Gelu = Literal["tanh", "exact"]
HeadBias = Annotated[float, Field(ge=-50.0, le=50.0)]
PosEmbed = Literal["none", "learned", "learned_2d", "relative", "sincos2d"]
PosEmbedAt = Literal["stem", "every_layer", "every_layer_shared"]
StageDepth = Annotated[int, Field(ge=1, le=64)]
ConvNumerics = Literal["official", "timm"]
"""Whose epsilons the convolutions of a stem use; the two disagree by about 1e-3 in the logits (vit/resnet.py)."""
PosResize = Literal["official", "bilinear", "bicubic", "bicubic_antialias", "bicubic_aligned"]
"""How position embeddings are resized to another grid (which code does what: docs/models.md):
official = bilinear, corners aligned (google-research/vision_transformer); bilinear = timm's npz import;
bicubic_antialias = timm's state-dict import; bicubic = Transformers; bicubic_aligned = torchvision."""

POOL_CHANGES: frozenset[tuple[Pool, Pool]] = frozenset({("cls", "patch_mean")})
"""From which pooling to which a fine-tune may change. The class token stays; the final norm is replaced by a new one
after the mean (facebookresearch/mae `models_vit.py`)."""

# name -> embed_dim, depth, num_heads, mlp_dim
VARIANTS: dict[str, tuple[int, int, int, int]] = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
    "So400m": (1152, 27, 16, 4304),
}
# hybrid -> stages of its stem, patch side on the stem's feature map
HYBRIDS: dict[str, tuple[tuple[int, ...], int]] = {
    "R50+B/16": ((3, 4, 9), 1),
    "R50+B/32": ((3, 4, 6, 3), 1),
    "R50+L/16": ((3, 4, 9), 1),
    "R50+L/32": ((3, 4, 6, 3), 1),
    "R26+S/32": ((2, 2, 2, 2), 1),
    "R26+B/32": ((2, 2, 2, 2), 1),
    "R+Ti/16": ((), 8),
}
"""The paper's hybrids (3.1, 4.1) and those of google-research/vision_transformer `configs/models.py`. /16 puts the
layers of stage 4 into stage 3 (R50: 3, 4, 9), for four times the tokens of /32. R+Ti/16 is the stem alone with patches
of 8 x 8: 32 pixels, whatever its official name says."""
_VARIANT = re.compile(r"^([A-Za-z0-9]+)/([1-9][0-9]{0,2})$")
SIZE_FIELDS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_dim")


def variant_sizes(variant: str) -> dict[str, Any]:
    """The five sizes that `variant` ("L/16") stands for, and the stem of a hybrid ("R50+L/16"); or the `resnet` that
    it is ("R50x1").

    Raises:
        ValueError: the variant is neither `<name>/<patch size>` nor `R<layers>x<width>` with a known name, nor one of
            the hybrids.
    """
    resnet = _RESNET.match(variant)
    if resnet is not None and resnet[1] in RESNETS:
        return {"resnet": ResNetConfig(layers=RESNETS[resnet[1]], width=RESNET_WIDTH * int(resnet[2]))}
    if variant in HYBRIDS:
        layers, patch_size = HYBRIDS[variant]
        name = variant.partition("+")[2].partition("/")[0]
        return variant_sizes(f"{name}/{patch_size}") | {"stem": StemConfig(layers=layers)}
    match = _VARIANT.match(variant)
    if match is None or match[1] not in VARIANTS:
        raise ValueError(
            f"variant {variant!r} is unknown: expected one of {', '.join(VARIANTS)} followed by /<patch size>, one of "
            f"the hybrids {', '.join(HYBRIDS)}, or one of {', '.join(RESNETS)} followed by x1 to x4"
        )
    embed_dim, depth, num_heads, mlp_dim = VARIANTS[match[1]]
    return {
        "patch_size": int(match[2]),
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_dim": mlp_dim,
    }


class StemConfig(Strict):
    """The convolutional stem of a hybrid: a post-activation ResNet with weight standardisation and group norm, whose
    feature map is cut into patches of `patch_size` x `patch_size` (paper, 3.1)."""

    layers: Annotated[tuple[StageDepth, ...], Field(max_length=4)] = Field(
        description="Bottlenecks of each stage; none: the 7 x 7 convolution and pooling alone."
    )
    width: Annotated[int, Field(ge=32, le=1024, multiple_of=32)] = Field(64, description="Channels of the first stage.")
    numerics: ConvNumerics = "official"

    @field_validator("layers", mode="before")
    @classmethod
    def _tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @property
    def stride(self) -> int:
        """Pixels per side of a feature: 4 after the stem, doubled by each stage but the first."""
        return 4 << max(len(self.layers) - 1, 0)

    @property
    def num_features(self) -> int:
        """Channels of the feature map."""
        return self.width * 4 << (len(self.layers) - 1) if self.layers else self.width


class ResNetConfig(StemConfig):
    """A BiT ResNet: a pre-activation ResNet (v2) with weight standardisation and group norm (Kolesnikov et al., 2020),
    without a Transformer."""

    layers: Annotated[tuple[StageDepth, ...], Field(min_length=1, max_length=4)] = Field(
        description="Bottlenecks of each stage."
    )


RESNETS: dict[str, tuple[int, ...]] = {
    "R26": (2, 2, 2, 2),
    "R50": (3, 4, 6, 3),
    "R101": (3, 4, 23, 3),
    "R152": (3, 8, 36, 3),
    "R200": (3, 24, 36, 3),
}
"""Bottlenecks of each stage (google-research/big_vision `models/bit.py`)."""
_RESNET = re.compile(r"^(R[0-9]+)x([1-4])$")
RESNET_WIDTH = 64


class ModelConfig(Strict):
    """A Vision Transformer, a hybrid or (`resnet`) a BiT ResNet as a user describes it. Either `variant`, or the sizes,
    or (when fine-tuning and evaluating) neither: then they are those of the checkpoint. A resolved job holds all of
    them."""

    variant: str | None = Field(
        None,
        description="Size and patch, such as L/16, a hybrid, such as R50+L/16, or a BiT ResNet, such as R50x1.",
        examples=["B/16"],
    )
    resnet: ResNetConfig | None = Field(
        None, description="A BiT ResNet; fields that only a Transformer has are then refused."
    )
    patch_size: Size | None = Field(None, description="Pixels; of a hybrid, features.")
    stem: StemConfig | None = Field(None, description="Convolutions before the patches: a hybrid.")
    embed_dim: Size | None = None
    depth: Size | None = None
    num_heads: Size | None = None
    mlp_dim: Size | None = None
    image_size: ImageSize | tuple[ImageSize, ImageSize] = Field(
        224, description="Pixels: one side, or [height, width]."
    )
    in_channels: Literal[1, 3] = 3
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(None, description="Left out: from the data.")
    head: Head = Field(
        "linear",
        description="linear: zero-initialised; mlp: one hidden layer with tanh (pre-training); masked_patch: the mean "
        "colour of every patch, set by train.objective masked_patch.",
    )
    head_bias_init: HeadBias = Field(
        0.0,
        description="The classifier's bias at the start of pre-training with the sigmoid loss (official code: -10).",
    )
    pool: Pool = Field(
        "cls",
        description="cls: the class token; gap: the mean of all tokens, no class token; patch_mean: the mean of the "
        "patches beside a class token, with the norm after it (MAE fine-tuning); map: a learned query attends to the "
        "patches, no class token (big_vision).",
    )
    registers: Registers = Field(0, description="Learned tokens beside the patches that nothing reads (DINOv2).")
    qk_norm: bool = Field(False, description="LayerNorm of each head's queries and keys (ViT-22B).")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Rate of the last block.")
    drop_path_rule: DropPathRule = Field(
        "linear", description="linear: from 0 at the first block; uniform: the same rate in every block (DeiT-III)."
    )
    layer_scale: LayerScale | None = Field(
        None,
        description="Where the learned factors on each channel of each residual branch start (LayerScale), such as "
        "1e-4; null: none.",
    )
    gelu: Gelu = "tanh"
    pos_embed: PosEmbed = Field(
        "learned",
        description="none; learned: one per token, in raster order; learned_2d: halves for column and row; relative: a "
        "term of attention for each 1-D offset of two patches; sincos2d: fixed sines and cosines (big_vision).",
    )
    pos_embed_at: PosEmbedAt = Field(
        "stem",
        description="Where learned positions are added: stem: once, before the blocks; every_layer: before each block, "
        "its own; every_layer_shared: before each block, the same (paper, D.4).",
    )
    pos_resize: PosResize = "official"

    @model_validator(mode="before")
    @classmethod
    def _sizes_from_variant(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        if isinstance(values.get("image_size"), list):
            # After this validator pydantic sees Python values, and its strict mode then wants a tuple.
            values = {**values, "image_size": tuple(values["image_size"])}
        if not isinstance(values.get("variant"), str):
            return values
        sizes = variant_sizes(values["variant"])
        for field, size in sizes.items():
            given = values.get(field)
            if field in ("stem", "resnet") and isinstance(given, dict):
                given = type(size).model_validate(given)
            if given is not None and given != size:
                raise ValueError(
                    f"{field} {given!r} contradicts variant {values['variant']!r}, whose {field} is {size}: "
                    "set variant to null and give all the sizes"
                )
        return {**values, **sizes}

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.resnet is not None:
            for field in VIT_FIELDS:
                if getattr(self, field) != type(self).model_fields[field].default:
                    raise ValueError(
                        f"{field} {getattr(self, field)!r} does not apply to a ResNet "
                        f"({self.variant or 'model.resnet'}), only to a Vision Transformer"
                    )
            return self
        given = [f for f in SIZE_FIELDS if getattr(self, f) is not None]
        if given and len(given) < len(SIZE_FIELDS):
            missing = [f for f in SIZE_FIELDS if f not in given]
            raise ValueError(f"sizes are incomplete: {', '.join(missing)} missing beside {', '.join(given)}")
        if self.embed_dim is not None and self.num_heads is not None and self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        _check_positions(self)
        if self.patch_size is not None:
            for side in self.image_hw:
                if side % self.stride:
                    raise ValueError(f"image_size {side} is not a multiple of {stride_text(self)}")
        return self

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def stride(self) -> int:
        """Pixels per side of a patch, the stem's reduction included. The sizes must be known."""
        assert self.patch_size is not None
        return self.patch_size * (self.stem.stride if self.stem else 1)

    @property
    def num_patches(self) -> int:
        """Of one image. The sizes must be known."""
        height, width = self.image_hw
        return (height // self.stride) * (width // self.stride)

    @property
    def has_sizes(self) -> bool:
        return self.embed_dim is not None or self.resnet is not None

    def network(self) -> VitConfig | BitConfig:
        """The complete configuration of a resolved job's model.

        Raises:
            ValueError: sizes or num_classes are still open.
        """
        if self.resnet is None:
            return self.vit()
        fields = self.model_dump(include=set(BitConfig.model_fields))
        return BitConfig.model_validate(fields | {"image_size": self.image_hw})

    def vit(self) -> VitConfig:
        """That of a Vision Transformer or hybrid.

        Raises:
            ValueError: it is a ResNet, or sizes or num_classes are still open.
        """
        if self.resnet is not None:
            raise ValueError("the model is a ResNet, not a Vision Transformer")
        fields = self.model_dump(include=set(VitConfig.model_fields))
        return VitConfig.model_validate(fields | {"image_size": self.image_hw})


class BitConfig(Strict):
    """Everything needed to build a BiT ResNet: what `vit.build` takes, and what lies beside exported weights."""

    resnet: ResNetConfig
    image_size: tuple[ImageSize, ImageSize]
    in_channels: Literal[1, 3] = 3
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)]
    head_bias_init: HeadBias = 0.0

    @property
    def has_classifier(self) -> bool:
        return True


class VitConfig(Strict):
    """Everything needed to build a Vision Transformer or hybrid: what `vit.build` takes, and what lies beside exported
    weights."""

    patch_size: Size
    stem: StemConfig | None = None
    embed_dim: Size
    depth: Size
    num_heads: Size
    mlp_dim: Size
    image_size: tuple[ImageSize, ImageSize]
    in_channels: Literal[1, 3] = 3
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)]
    head: Head = "linear"
    head_bias_init: HeadBias = 0.0
    pool: Pool = "cls"
    registers: Registers = 0
    qk_norm: bool = False
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    drop_path_rule: DropPathRule = "linear"
    layer_scale: LayerScale | None = None
    gelu: Gelu = "tanh"
    pos_embed: PosEmbed = "learned"
    pos_embed_at: PosEmbedAt = "stem"
    pos_resize: PosResize = "official"

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_positions(self)
        if self.head == "masked_patch":
            _check_masked_patch(self)
        return self

    @property
    def has_cls_token(self) -> bool:
        return self.pool in ("cls", "patch_mean")

    @property
    def num_prefix(self) -> int:
        """Tokens before those of the patches: the class token, if there is one, then the registers."""
        return (1 if self.has_cls_token else 0) + self.registers

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride

    @property
    def stride(self) -> int:
        """Pixels per side of a patch, the stem's reduction included."""
        return self.patch_size * (self.stem.stride if self.stem else 1)

    @property
    def patch_channels(self) -> int:
        """Channels of what is cut into patches: the image's, or the stem's features."""
        return self.stem.num_features if self.stem else self.in_channels

    @property
    def num_tokens(self) -> int:
        """Sequence length, with class token and registers if there are any."""
        rows, columns = self.grid
        return self.num_prefix + rows * columns

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def has_classifier(self) -> bool:
        """Whether its logits are about images; a head that tells colours of patches is about these."""
        return self.head != "masked_patch"


VIT_FIELDS = tuple(sorted(set(VitConfig.model_fields) - set(BitConfig.model_fields)))
"""What a job says of a Transformer only."""


def without_tags(loc: Iterable[str | int]) -> tuple[str | int, ...]:
    """The place of a pydantic error in the document, without the tags that it puts there for a `NetworkConfig`."""
    return tuple(part for part in loc if part not in ("vit", "bit"))


def _family(value: object) -> str:
    is_bit = value.get("resnet") is not None if isinstance(value, dict) else isinstance(value, BitConfig)
    return "bit" if is_bit else "vit"


NetworkConfig = Annotated[Annotated[VitConfig, Tag("vit")] | Annotated[BitConfig, Tag("bit")], Discriminator(_family)]
"""Either; what is stored is a BitConfig if it has a `resnet`."""
network_adapter: TypeAdapter[VitConfig | BitConfig] = TypeAdapter(NetworkConfig)


def _check_positions(config: ModelConfig | VitConfig) -> None:
    if config.pos_embed_at != "stem" and config.pos_embed not in ("learned", "learned_2d"):
        raise ValueError(
            f"pos_embed_at {config.pos_embed_at} does not apply to pos_embed {config.pos_embed}, only to learned and "
            "learned_2d"
        )
    dim = config.embed_dim
    if dim is None:
        return
    if config.pos_embed == "sincos2d" and (dim % 4 or dim < 8):
        raise ValueError(f"pos_embed sincos2d needs an embed_dim that is a multiple of 4, got {dim}")
    if config.pos_embed == "learned_2d" and dim % 2:
        raise ValueError(f"pos_embed learned_2d needs an even embed_dim, got {dim}")


def num_colours(in_channels: int) -> int:
    """The mean colours that masked patch prediction tells apart: 512 of three channels."""
    return int(NUM_LEVELS**in_channels)


def _check_masked_patch(config: VitConfig) -> None:
    rows, columns = config.grid
    if rows * columns < 2:
        raise ValueError(f"head masked_patch needs at least 2 patches, image_size {config.image_size} gives 1")
    if config.pool not in ("cls", "gap"):
        raise ValueError(f"head masked_patch does not apply to pool {config.pool}, only to cls and gap")
    if config.num_classes != num_colours(config.in_channels):
        raise ValueError(
            f"head masked_patch tells {num_colours(config.in_channels)} colours of {config.in_channels} channels, "
            f"num_classes is {config.num_classes}"
        )


def stride_text(config: ModelConfig | VitConfig) -> str:
    """The number an image's side must be a multiple of, and why."""
    if config.stem is None:
        return f"patch_size {config.patch_size}"
    return f"{config.stride} (patch_size {config.patch_size} x the stem's stride {config.stem.stride})"
