"""States of jobs and attempts, and what users and the scheduler may desire."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    QUEUED = "QUEUED"
    PREPARING = "PREPARING"
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    STOPPING = "STOPPING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_terminal(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)

    @property
    def holds_resources(self) -> bool:
        """Whether the job's workers are counted against the cluster."""
        return self in (JobState.PREPARING, JobState.RUNNING, JobState.RECOVERING, JobState.PAUSING, JobState.STOPPING)


class Desired(StrEnum):
    """Written by users and the scheduler; only the reconciler turns it into a state."""

    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"
    YIELD = "yield"


class AttemptState(StrEnum):
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    ENDED = "ENDED"
