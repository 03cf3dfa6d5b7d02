"""What an evaluation may measure of frozen features, beside the accuracy of the classifier."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from configs.base import Positive, Seed, Strict

Shots = Annotated[int, Field(ge=1, le=1000)]


class FewShot(Strict):
    """Least squares on the features of a few training examples of each class, tested on the evaluation split (paper,
    4.1; google-research/big_vision `configs/common_fewshot.py`)."""

    shots: Annotated[tuple[Shots, ...], Field(min_length=1, max_length=20)] = Field(
        (1, 5, 10, 25), description="Examples of each class; one result for each number."
    )
    num_seeds: Annotated[int, Field(ge=1, le=20)] = Field(3, description="Choices of examples; the mean is reported.")
    l2: Annotated[float, Field(gt=0.0, le=1e12)] = Field(1024.0, description="Penalty on the squared weights.")

    @field_validator("shots", mode="before")
    @classmethod
    def _tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class Neighbours(Strict):
    """The weighted vote of the nearest training examples by cosine similarity (Wu et al. 2018, 3.4)."""

    k: Annotated[int, Field(ge=1, le=1000)] = 20
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 0.07
    max_examples: Positive = Field(65_000, description="Training examples at most, chosen by seed.")
    seed: Seed = 0
