"""What the API says and takes of a VTAB suite: fine-tunes of one checkpoint on many data sets, with one setting."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AwareDatetime, Field, StringConstraints

from configs.base import Positive, Seed, Slug, Stored, Strict
from configs.vtab import STEPS

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class VtabTask(Strict):
    """A data set of the suite."""

    name: TaskName = Field(description="In the report, and in the job's name.")
    group: TaskName = Field("all", description="VTAB's are natural, specialized and structured; a mean is of a group.")
    source: dict[str, Any] = Field(description="As data.source of a job.")
    train: str = "train"
    eval: str = "test"


class VtabCreate(Strict):
    """A suite to run: one fine-tune for each data set (configs/vtab.py)."""

    name: Slug = Field(description="Of the suite; its jobs carry it as the label vtab.")
    init_from: str = Field(description="The checkpoint to judge: ckpt_…, job_…/best or job_…/latest.")
    tasks: Annotated[tuple[VtabTask, ...], Field(min_length=1, max_length=100)]
    steps: Positive = STEPS
    held_out: bool = Field(
        False, description="Train on 800 of each 1,000 images and measure on the other 200, to choose settings by."
    )
    seed: Seed = 0
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="Dotted keys for every job, such as resources.workers."
    )


class VtabResult(Stored):
    """A data set of a suite: the job, and what it reached."""

    task: str
    group: str
    job_id: str
    state: str
    reason: str | None
    step: int
    total_steps: int | None
    top1: float | None = Field(description="At the end of training; null until the job has succeeded.")


class VtabGroup(Stored):
    name: str
    num_tasks: int
    num_done: int
    top1: float | None = Field(description="Mean over the group's data sets; null until all of them are done.")


class VtabReport(Stored):
    """What a suite has found so far."""

    name: str
    init_from: str
    split: str = Field(description="test: the evaluation splits; held out: 200 of the 1,000 training images.")
    results: tuple[VtabResult, ...]
    groups: tuple[VtabGroup, ...]
    num_done: int
    top1: float | None = Field(description="Mean over all data sets; null until all of them are done.")
    made_at: AwareDatetime
