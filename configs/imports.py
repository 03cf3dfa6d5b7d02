"""Weights brought from elsewhere: what a user says of the file, and what is kept of where it came from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from configs.base import Label, Stored, Strict
from configs.model import Gelu, ImageSize, Size

UPLOAD_ID_PATTERN = r"^upl_[0-9A-HJKMNP-TV-Z]{26}$"
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
WeightFormat = Literal["patchwork", "timm", "transformers", "torchvision", "npz"]
"""patchwork: our own names; npz: the official files (google-research/vision_transformer, big_vision)."""
Origin = Annotated[str, StringConstraints(max_length=2000, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""A URL or a sentence."""

READ_SUFFIXES = (".safetensors", ".npz")
REFUSED_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar", ".h5", ".hdf5", ".msgpack")
HOW_TO_CONVERT = (
    "such files can run code when they are read. Convert it where you trust it: "
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file({k: v.contiguous() for k, v in torch.load('IN.pth', weights_only=True).items()}, 'OUT.safetensors')\""
)


class ImportModel(Strict):
    """What the tensors of a file do not say of their model. Left out: see each field."""

    num_heads: Size | None = Field(None, description="Left out: the file's (npz), or that of the known width.")
    image_size: ImageSize | tuple[ImageSize, ImageSize] | None = Field(
        None, description="Left out: square, from the number of positions."
    )
    gelu: Gelu | None = Field(None, description="Left out: tanh for npz, exact for timm, Transformers and torchvision.")
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="For a file without a classifier: gives it a zero one of so many classes."
    )

    @field_validator("image_size", mode="before")
    @classmethod
    def _tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class ImportPreprocess(Strict):
    """How images are prepared for the weights."""

    mean: tuple[float, ...] = Field((0.5,), min_length=1, max_length=3)
    std: tuple[Annotated[float, Field(gt=0.0)], ...] = Field((0.5,), min_length=1, max_length=3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = False
    crop: Literal["resize", "center"] = "resize"
    class_names: tuple[Label, ...] | None = Field(None, max_length=100_000)

    @field_validator("mean", "std")
    @classmethod
    def _one_or_three(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in (1, 3):
            raise ValueError(f"needs one value or three, got {len(value)}")
        return value


class WeightOrigin(Stored):
    """Where imported weights came from: kept in the checkpoint's manifest."""

    file: str
    """The original name of the file."""
    num_bytes: int
    sha256: str
    format: str
    source: str = ""
    """In the words of who imported it: a URL, or text."""


def refused_by_name(file: str) -> str | None:
    """Why a file of this name is not read, or None."""
    name = file.lower()
    if name.endswith(REFUSED_SUFFIXES):
        return f"{file}: {HOW_TO_CONVERT}"
    if not name.endswith(READ_SUFFIXES):
        return f"{file}: weights are read from {' and '.join(READ_SUFFIXES)} files"
    return None
