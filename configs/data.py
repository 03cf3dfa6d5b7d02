"""The data part of a job description: where images come from, which of them, and how they are prepared."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from configs.base import Fraction, Positive, Seed, Slug, Strict
from configs.ids import IMAGE_ID_PATTERN

TorchvisionName = Literal["FashionMNIST", "MNIST", "CIFAR10", "CIFAR100", "Flowers102", "OxfordIIITPet", "ImageNet"]


class TorchvisionSource(Strict):
    """A data set of torchvision, under the node's data root."""

    type: Literal["torchvision"]
    name: TorchvisionName
    download: Literal["auto", "never"] = Field("auto", description="auto: once per node, under a lock.")


class FolderSource(Strict):
    """A registered image folder, `<data root>/<path>/<split>/<class>/<image>`; registration makes its index once."""

    type: Literal["folder"]
    name: Slug = Field(description="The name it was registered under (patchwork datasets add).")


class SyntheticSource(Strict):
    """Generated images (a class is a colour and a texture), for tests and throughput measurements."""

    type: Literal["synthetic"]
    num_train: Annotated[int, Field(ge=1, le=10_000_000)] = 1024
    num_eval: Annotated[int, Field(ge=1, le=10_000_000)] = 256
    num_classes: Annotated[int, Field(ge=1, le=100_000)] = 10
    image_size: Annotated[int, Field(ge=1, le=2048)] = 32


ImageId = Annotated[str, StringConstraints(pattern=IMAGE_ID_PATTERN)]
MAX_UPLOADED_IMAGES = 16
"""In one job: they are drawn beside one another."""


class ImagesSource(Strict):
    """Images that somebody uploaded (POST /v1/images), without labels: for inspect jobs."""

    type: Literal["images"]
    ids: Annotated[tuple[ImageId, ...], Field(min_length=1, max_length=MAX_UPLOADED_IMAGES)]

    @field_validator("ids", mode="before")
    @classmethod
    def _tuple(cls, value: object) -> object:
        """What comes as a list: pydantic's strict mode wants tuples of Python values."""
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        twice = sorted({name for name in self.ids if self.ids.count(name) > 1})
        if twice:
            raise ValueError(f"ids: {', '.join(twice)} is named twice")
        return self


Source = Annotated[TorchvisionSource | FolderSource | SyntheticSource, Field(discriminator="type")]
"""Images with labels."""
AnySource = Annotated[TorchvisionSource | FolderSource | SyntheticSource | ImagesSource, Field(discriminator="type")]
NOT_BUILT_SOURCES = ("shards", "parquet", "dataset")


class Subset(Strict):
    """A seeded part of the training split: a fraction of it, so many examples, or so many of each class."""

    fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    examples: Positive | None = Field(None, description="So many in all, whatever their classes (VTAB-1k: 1000).")
    per_class: Positive | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        given = [f for f in ("fraction", "examples", "per_class") if getattr(self, f) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of fraction, examples and per_class, got {', '.join(given) or 'none'}")
        return self


class Holdout(Strict):
    """A seeded part of the training split kept away from training and used for evaluation instead of `eval`.
    Chosen by permutation, never by slice: class-ordered folders would lose whole classes."""

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    examples: Positive | None = None
    of: Literal["split", "subset"] = Field(
        "split", description="subset: taken out of data.subset (VTAB-1k's 800 + 200); split: before it is chosen."
    )
    seed: Seed = 0

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.fraction is None) == (self.examples is None):
            raise ValueError("give exactly one of fraction and examples")
        return self


class RandAugment(Strict):
    """RandAugment in the dialect of one code base: operations and what a magnitude means are its own."""

    ops: Literal["torchvision", "big_vision", "timm"] = "torchvision"
    num_ops: Annotated[int, Field(ge=1, le=10)] = 2
    magnitude: Annotated[float, Field(ge=0.0, le=30.0)] = Field(
        9.0, description="torchvision: 0 to 30; timm: 0 to 10; big_vision: 10 is its scale, more is allowed."
    )
    magnitude_std: Annotated[float, Field(ge=0.0, le=10.0)] = Field(0.0, description="timm only.")

    @model_validator(mode="after")
    def _check_magnitude(self) -> Self:
        if self.ops == "timm" and self.magnitude > 10.0:
            raise ValueError(f"magnitude {self.magnitude:g}: ops timm takes at most 10")
        if self.ops != "timm" and self.magnitude_std > 0.0:
            raise ValueError(f"magnitude_std does not apply to ops {self.ops}")
        return self


class Augment(Strict):
    """Training augmentation; each sample's is a pure function of (seed, epoch, sample index)."""

    crop: Literal["inception", "simple", "resize"] = Field(
        "inception",
        description="inception: random area and aspect, resized to image_size; simple: resized to cover image_size, "
        "4 pixels reflected at each side, cropped at random (DeiT-III's Simple Random Crop); resize: no crop.",
    )
    crop_area: tuple[Fraction, Fraction] = Field((0.05, 1.0), description="Area range of the Inception crop.")
    flip: bool = True
    randaugment: RandAugment | None = None
    three_augment: bool = Field(False, description="One of greyscale, solarise and blur for each image (DeiT-III).")
    color_jitter: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="Brightness, contrast and saturation change by up to this share."
    )
    random_erasing: Fraction = Field(0.0, description="Probability that a box of an image becomes noise.")
    repeats: Annotated[int, Field(ge=1, le=16)] = Field(
        1, description="Views of each image in a batch; an epoch then visits so many times fewer images."
    )

    @model_validator(mode="after")
    def _check_area(self) -> Self:
        low, high = self.crop_area
        if not 0.0 < low <= high:
            raise ValueError(f"crop_area {list(self.crop_area)}: expected 0 < low <= high <= 1")
        if self.crop != "inception" and "crop_area" in self.model_fields_set and self.crop_area != (0.05, 1.0):
            raise ValueError("crop_area applies to crop: inception only")
        if self.randaugment is not None and self.three_augment:
            raise ValueError("three_augment and randaugment exclude one another")
        return self

    @property
    def distorts(self) -> bool:
        """Whether anything but crop and flip is asked for."""
        return (
            self.randaugment is not None or self.three_augment or self.color_jitter > 0.0 or self.random_erasing > 0.0
        )


Alpha = Annotated[float, Field(ge=0.0, le=2.0)]


class Mix(Strict):
    """Mixup and cutmix between samples 2i and 2i + 1 of the global batch, with one draw per step. With both, each step
    does one of them."""

    mixup: Alpha = Field(0.0, description="Shares are drawn from Beta(mixup, mixup); 0: off.")
    cutmix: Alpha = Field(0.0, description="Shares are drawn from Beta(cutmix, cutmix); 0: off.")
    cutmix_share: Fraction = Field(0.5, description="Of the steps, where both are on.")
    probability: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="Of a step to be mixed at all.")

    @model_validator(mode="after")
    def _check_use(self) -> Self:
        if self.mixup == self.cutmix == 0.0:
            raise ValueError("give mixup or cutmix, or leave mix out")
        if self.cutmix_share != 0.5 and 0.0 in (self.mixup, self.cutmix):
            raise ValueError("cutmix_share applies where both mixup and cutmix are on")
        return self


class DataConfig(Strict):
    """Data of a job. Images are scaled to (x / 255 - mean) / std."""

    source: AnySource
    train: str = Field("train", description="Split to train on.", examples=["train", "trainval"])
    eval: str = Field("test", description="Split to evaluate on.", examples=["test", "val"])
    subset: Subset | None = None
    holdout: Holdout | None = None
    augment: Augment = Augment()
    mix: Mix | None = Field(None, description="Mixup and cutmix; none: neither.")
    eval_crop: Literal["resize", "center"] = Field(
        "resize", description="resize: direct square resize (official); center: resize to 8/7, central crop."
    )
    mean: tuple[float, ...] = Field((0.5,), description="One value, or one per channel.")
    std: tuple[Annotated[float, Field(gt=0.0)], ...] = (0.5,)
    loader_workers: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="Decode threads per rank; 0: one prefetch thread."
    )
    max_corrupt: Fraction = Field(0.001, description="Share of unreadable images tolerated before the job fails.")

    @field_validator("source", mode="before")
    @classmethod
    def _refuse_unbuilt(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("type") in NOT_BUILT_SOURCES:
            raise ValueError(
                f"type {value['type']!r} is not available yet: use torchvision, folder, synthetic or (inspect) images"
            )
        return value

    @model_validator(mode="after")
    def _check_holdout(self) -> Self:
        if self.holdout is not None and self.holdout.of == "subset" and self.subset is None:
            raise ValueError("holdout.of subset needs a subset")
        return self

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        for field in ("mean", "std"):
            if len(getattr(self, field)) not in (1, 3):
                raise ValueError(f"{field} needs one value or three, got {len(getattr(self, field))}")
        return self
