"""What `GET /v1/overview`, `/v1/compare` and a job's lineage answer: views over many jobs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, Field

from configs.base import Stored
from orchestrator.schemas import ClusterPublic, JobPublic


class Devices(Stored):
    """What the cluster has, of nodes that are alive, and what jobs hold of it."""

    cpus: float
    gpus: float
    cpus_used: float
    gpus_used: float


class StorageUse(Stored):
    num_checkpoints: int = Field(description="That are kept.")
    num_bytes: int = Field(description="Of their files.")


class OverviewPublic(Stored):
    """The service at a glance. Lists are cut; `counts` are whole."""

    cluster: ClusterPublic
    devices: Devices
    counts: dict[str, int] = Field(description="Jobs by state, ended ones too.")
    active: tuple[JobPublic, ...] = Field(description="Those that hold workers, the newest first.")
    queued: tuple[JobPublic, ...] = Field(description="Those that wait, in the order in which they will start.")
    failed: tuple[JobPublic, ...] = Field(description="Of the last seven days, the newest first.")
    storage: StorageUse


class LineageJob(Stored):
    """A job among those that came of one another."""

    id: str
    name: str
    kind: str
    state: str
    step: int
    created_at: AwareDatetime


class LineageLink(Stored):
    """What one job took from another."""

    source: str = Field(description="The job it was taken from.")
    target: str = Field(description="The job that took it.")
    how: Literal["retry", "fork", "weights"] = Field(
        description="retry: the same again; fork: goes on from a checkpoint, optimizer too; weights: starts from them."
    )
    checkpoint: str | None = Field(description="Which one; null: none, or not resolved yet.")


class LineagePublic(Stored):
    """The jobs that a job came of and those that came of it, as far as that goes."""

    jobs: tuple[LineageJob, ...] = Field(description="The oldest first.")
    links: tuple[LineageLink, ...]
    complete: bool = Field(description="False: there are more than are shown.")


class ComparedJob(Stored):
    """A job among those compared. `index` is its place in every list of values."""

    index: int
    id: str
    name: str
    kind: str
    state: str
    started_at: AwareDatetime | None
    global_batch_size: int | None = Field(description="Images of a step, to count images seen.")


class SpecDifference(Stored):
    """A field in which the jobs' resolved descriptions differ."""

    pointer: str = Field(description="JSON pointer.")
    values: tuple[Any, ...] = Field(description="One for each job; null where it has no such field.")


class ComparedSeries(Stored):
    """One job's curve of one metric, as columns: the mean, lowest and highest of equal ranges of steps."""

    index: int = Field(description="Which job.")
    name: str
    steps: tuple[int, ...]
    seconds: tuple[float, ...] = Field(description="Since the job first started.")
    values: tuple[float | None, ...]
    lows: tuple[float | None, ...]
    highs: tuple[float | None, ...]
    last: float | None
    lowest: float | None
    highest: float | None


class ComparisonPublic(Stored):
    jobs: tuple[ComparedJob, ...]
    names: tuple[str, ...] = Field(description="Every metric that any of the jobs has.")
    series: tuple[ComparedSeries, ...]
    differences: tuple[SpecDifference, ...]
