"""What an evaluation may measure of frozen features, beside the accuracy of the classifier."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import Field, StringConstraints, field_validator

from configs.base import Positive, Seed, Strict
from configs.data import Source, SyntheticSource

Shots = Annotated[int, Field(ge=1, le=1000)]
ProbeName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class ProbeData(Strict):
    """A data set that features are probed on in place of the job's own."""

    source: Source
    train: str = Field("train", description="Split to learn from.")
    eval: str = Field("test", description="Split to test on.")
    name: ProbeName | None = Field(None, description="In the metrics' names; left out: the data set's.")
    fingerprint: str | None = Field(
        None, description="Of a registered folder, filled in at submission: the job keeps to what it holds then."
    )

    @property
    def label(self) -> str:
        """What its metrics are called by."""
        return self.name or ("synthetic" if isinstance(self.source, SyntheticSource) else self.source.name)


Datasets = Annotated[tuple[ProbeData, ...], Field(max_length=50)]
_DATASETS: Datasets = Field(
    (), description="Data sets to probe in place of the job's own, each with metrics of its own name."
)


def _tuple(value: object) -> object:
    """What comes as a list: pydantic's strict mode wants tuples of Python values."""
    return tuple(value) if isinstance(value, list) else value


def _distinct(datasets: Datasets) -> Datasets:
    """Raises ValueError if two share a name."""
    label, count = Counter(dataset.label for dataset in datasets).most_common(1)[0] if datasets else ("", 0)
    if count > 1:
        raise ValueError(f"datasets: {count} of them are called {label!r}, give each a name of its own")
    return datasets


class FewShot(Strict):
    """Least squares on the features of a few training examples of each class, tested on the evaluation split (paper,
    4.1; google-research/big_vision `configs/common_fewshot.py`)."""

    shots: Annotated[tuple[Shots, ...], Field(min_length=1, max_length=20)] = Field(
        (1, 5, 10, 25), description="Examples of each class; one result for each number."
    )
    num_seeds: Annotated[int, Field(ge=1, le=20)] = Field(3, description="Choices of examples; the mean is reported.")
    l2: Annotated[float, Field(gt=0.0, le=1e12)] = Field(1024.0, description="Penalty on the squared weights.")
    datasets: Datasets = _DATASETS

    _tuples = field_validator("shots", "datasets", mode="before")(_tuple)
    _names = field_validator("datasets")(_distinct)


class Neighbours(Strict):
    """The weighted vote of the nearest training examples by cosine similarity (Wu et al. 2018, 3.4)."""

    k: Annotated[int, Field(ge=1, le=1000)] = 20
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 0.07
    max_examples: Positive = Field(65_000, description="Training examples at most, chosen by seed.")
    seed: Seed = 0
    datasets: Datasets = _DATASETS

    _tuples = field_validator("datasets", mode="before")(_tuple)
    _names = field_validator("datasets")(_distinct)
