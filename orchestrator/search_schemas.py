"""Public models of searches: what the API answers and takes, and what the client returns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from configs.base import Stored, Strict
from configs.search import MAX_TRIALS
from orchestrator.schemas import JobPublic


class TrialPublic(Stored):
    """A trial of a search. It is a job too: `GET /v1/jobs/{job_id}` says the rest."""

    number: int
    job_id: str
    role: Literal["trial", "final"] = Field(description="final: the best setting once more, after the search.")
    state: str
    reason: str | None
    message: str = Field(description="Why it is in its state; of a stopped one, by which rule.")
    setting: int = Field(description="Repeats of one setting share it.")
    repeat: int
    params: dict[str, Any] = Field(description="What it has other than the base.")
    parent: int | None = Field(description="The trial whose checkpoint it went on from (pbt).")
    parent_step: int | None
    replaces: int | None = Field(description="The trial in whose place it came (pbt).")
    value: float | None = Field(description="The metric's last value.")
    curve: tuple[tuple[int, float], ...] = Field(description="Step and value of the metric, if asked for.")
    step: int
    total_steps: int | None
    gpu_seconds: float
    checkpoint: str | None = Field(description="Its newest checkpoint.")
    started_at: AwareDatetime | None
    ended_at: AwareDatetime | None


class TrialPage(Stored):
    items: tuple[TrialPublic, ...]
    """By number."""


class SearchPublic(Stored):
    """A search: its job, how far it is, and the best so far."""

    job: JobPublic
    metric: str
    mode: Literal["max", "min"]
    num_trials: int = Field(description="The budget now.")
    slots: int | None = Field(description="At most so many trials side by side, if a user said so.")
    places: int | None = Field(None, description="So many may run side by side now, if the scheduler has changed it.")
    num_ended: int
    states: dict[str, int] = Field(description="Trials by state.")
    gpu_seconds: float = Field(description="Of all trials.")
    best: TrialPublic | None
    final: TrialPublic | None


class TrialsAdd(Strict):
    """More trials for a search, running or ended."""

    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)]


class SlotsSet(Strict):
    """How many trials may run side by side from now on; null: as many as the search holds workers for."""

    slots: Annotated[int, Field(ge=1, le=1000)] | None
