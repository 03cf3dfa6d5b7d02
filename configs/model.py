"""The model part of a job description, and the complete model configuration stored with every checkpoint.

Sizes follow Table 1 of "An Image is Worth 16x16 Words" (B, L, H) and google-research/big_vision `models/vit.py`
(Ti, S, g, G, So400m).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.base import Strict

Size = Annotated[int, Field(ge=1, le=65536)]
ImageSize = Annotated[int, Field(ge=1, le=4096)]
Head = Literal["linear", "mlp"]
Pool = Literal["cls", "gap"]
Gelu = Literal["tanh", "exact"]
HeadBias = Annotated[float, Field(ge=-50.0, le=50.0)]
PosEmbed = Literal["learned", "sincos2d"]
PosResize = Literal["official", "bilinear", "bicubic", "bicubic_antialias", "bicubic_aligned"]
"""How position embeddings are resized to another grid (which code does what: docs/models.md):
official = bilinear, corners aligned (google-research/vision_transformer); bilinear = timm's npz import;
bicubic_antialias = timm's state-dict import; bicubic = Transformers; bicubic_aligned = torchvision."""

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
_VARIANT = re.compile(r"^([A-Za-z0-9]+)/([1-9][0-9]{0,2})$")
SIZE_FIELDS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_dim")


def variant_sizes(variant: str) -> dict[str, int]:
    """The five sizes that `variant` ("L/16") stands for.

    Raises:
        ValueError: the variant is not `<name>/<patch size>` with a known name.
    """
    match = _VARIANT.match(variant)
    if match is None or match[1] not in VARIANTS:
        raise ValueError(
            f"variant {variant!r} is unknown: expected one of {', '.join(VARIANTS)} followed by /<patch size>"
        )
    embed_dim, depth, num_heads, mlp_dim = VARIANTS[match[1]]
    return {
        "patch_size": int(match[2]),
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_dim": mlp_dim,
    }


class ModelConfig(Strict):
    """A Vision Transformer as a user describes it. Either `variant`, or the five sizes, or (when fine-tuning and
    evaluating) neither: then they are those of the checkpoint. A resolved job holds all of them."""

    variant: str | None = Field(None, description="Size and patch, such as L/16.", examples=["B/16"])
    patch_size: Size | None = None
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
        "linear", description="linear: zero-initialised; mlp: one hidden layer with tanh (pre-training)."
    )
    head_bias_init: HeadBias = Field(
        0.0,
        description="The classifier's bias at the start of pre-training with the sigmoid loss (official code: -10).",
    )
    pool: Pool = "cls"
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Rate of the last block; linear from 0."
    )
    gelu: Gelu = "tanh"
    pos_embed: PosEmbed = Field("learned", description="sincos2d: fixed sines and cosines (big_vision).")
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
            if given is not None and given != size:
                raise ValueError(
                    f"{field} {given!r} contradicts variant {values['variant']!r}, whose {field} is {size}: "
                    "set variant to null and give all five sizes"
                )
        return {**values, **sizes}

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        given = [f for f in SIZE_FIELDS if getattr(self, f) is not None]
        if given and len(given) < len(SIZE_FIELDS):
            missing = [f for f in SIZE_FIELDS if f not in given]
            raise ValueError(f"sizes are incomplete: {', '.join(missing)} missing beside {', '.join(given)}")
        if self.embed_dim is not None and self.num_heads is not None and self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.pos_embed == "sincos2d" and self.embed_dim is not None and (self.embed_dim % 4 or self.embed_dim < 8):
            raise ValueError(f"pos_embed sincos2d needs an embed_dim that is a multiple of 4, got {self.embed_dim}")
        if self.patch_size is not None:
            for side in self.image_hw:
                if side % self.patch_size:
                    raise ValueError(f"image_size {side} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def has_sizes(self) -> bool:
        return self.embed_dim is not None

    def vit(self) -> VitConfig:
        """The complete configuration of a resolved job's model.

        Raises:
            ValueError: sizes or num_classes are still open.
        """
        return VitConfig.model_validate(self.model_dump(exclude={"variant"}) | {"image_size": self.image_hw})


class VitConfig(Strict):
    """Everything needed to build the model: what `vit.build` takes, and what lies beside exported weights."""

    patch_size: Size
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
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    gelu: Gelu = "tanh"
    pos_embed: PosEmbed = "learned"
    pos_resize: PosResize = "official"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Sequence length, with the class token if there is one."""
        rows, columns = self.grid
        return rows * columns + (1 if self.pool == "cls" else 0)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads
