"""What the driver of a search and the control plane say to one another about trials.

The rows of the control plane are the truth. A driver that begins again reads them (`SearchState`) and goes on: its
sampler is asked and told once more in the order that they tell.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, Field

from configs.base import Stored
from configs.states import JobState
from configs.wire import AttemptFile, Count, ExitFile

Role = Literal["trial", "final"]


class TrialRecord(Stored):
    """One trial, as the control plane knows it."""

    number: int
    """From 1, in the order they were made."""
    job_id: str
    state: JobState
    reason: str | None = None
    message: str = ""
    role: Role = "trial"
    setting: int
    """Which setting of the search, from 0: repeats of one share it."""
    repeat: int = 0
    params: dict[str, Any]
    parent: int | None = None
    """The trial whose checkpoint this one continues from (pbt)."""
    parent_step: int | None = None
    replaces: int | None = None
    """The trial in whose place it came (pbt)."""
    asked_after: int = 0
    """How many results the sampler had been told when it gave this setting."""
    told: int | None = None
    """The place of this trial's end among all ends, from 1."""
    curve: tuple[tuple[int, float], ...] = ()
    """Step and value of the search's metric, by step; values that are not finite are left out."""
    has_metric: bool = False
    """The metric came, were it only as values that are not finite."""
    step: int = 0
    total_steps: int | None = None
    gpu_seconds: float = 0.0

    @property
    def value(self) -> float | None:
        """The last value of the metric."""
        return self.curve[-1][1] if self.curve else None


class SearchLimits(Stored):
    """What users and the scheduler may change of a search while it runs."""

    num_trials: int
    """The budget now: it may have grown."""
    slots: int | None = None
    """At most so many trials side by side, if a user said so."""
    places: int | None = None
    """So many trials may run side by side now, by the scheduler; None: as many as the attempt began with."""

    def side_by_side(self, began_with: int) -> int:
        """How many trials may run at once, of a search that began with room for so many."""
        places = began_with if self.places is None else self.places
        return places if self.slots is None else min(places, self.slots)


class SearchState(SearchLimits):
    """Everything a driver needs to go on."""

    job_id: str
    ran_s: float = 0.0
    """Running time of the search's earlier attempts."""
    trials: tuple[TrialRecord, ...] = ()


class TrialCreate(Stored):
    """A trial that the search makes. The same number again, with the same content, changes nothing."""

    number: Count
    role: Role = "trial"
    setting: Count
    repeat: Count = 0
    params: dict[str, Any]
    parent: Count | None = None
    parent_step: Count | None = None
    """Continue from the parent's newest checkpoint up to this step."""
    replaces: Count | None = None
    asked_after: Count = 0


class TrialBegun(Stored):
    """The answer to the beginning of a trial's next attempt: its file, unless the trial has ended."""

    trial: TrialRecord
    attempt: AttemptFile | None = None


class TrialEnd(Stored):
    """How an attempt of a trial ended, as written to its exit.json."""

    exit: ExitFile


class TrialEnded(Stored):
    trial: TrialRecord
    delay_s: float = 0.0
    """Of a trial that has not ended: when to begin it again."""


# -- what it found -----------------------------------------------------------------------------------------------------
class SettingReport(Stored):
    """A setting with its rank's evidence."""

    params: dict[str, Any]
    mean: float
    std: float | None
    """Over repeats; null of one."""
    trials: tuple[int, ...]
    is_complete: bool


class SearchReport(Stored):
    """`search/report.json`."""

    schema_version: int = 1
    job_id: str
    metric: str
    mode: Literal["max", "min"]
    algorithm: str
    scheduler: str
    best: TrialRecord
    final: TrialRecord | None = None
    settings: tuple[SettingReport, ...]
    """Best first."""
    importances: dict[str, float] = Field(default_factory=dict)
    """Of each varied key, together 1 (Optuna's PED-ANOVA); empty where they cannot be told."""
    states: dict[str, int]
    """Trials by state."""
    gpu_seconds: float
    """Of all trials."""
    created_at: AwareDatetime
