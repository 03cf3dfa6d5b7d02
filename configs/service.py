"""What a job asks of the service: machines, place in the queue, retries."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from configs.base import Slug, Strict

Workers = Annotated[int, Field(ge=1, le=4096)]


class WorkerRange(Strict):
    """An elastic job's worker counts; those that divide the batch are allowed."""

    min: Workers
    max: Workers

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Resources(Strict):
    """Workers and what each of them holds. `gpus_per_worker: 0` trains on CPU (gloo)."""

    workers: Workers | WorkerRange = 1
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 1
    cpus_per_worker: Annotated[int, Field(ge=1, le=256)] = 1
    accelerator: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")] | None = Field(
        None, description="Ray's accelerator type, such as H100; null: any."
    )

    @model_validator(mode="after")
    def _refuse_unused(self) -> Self:
        if self.accelerator is not None and self.gpus_per_worker == 0:
            raise ValueError("accelerator does not apply when gpus_per_worker is 0")
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        if isinstance(self.workers, int):
            return self.workers, self.workers
        return self.workers.min, self.workers.max


class Queue(Strict):
    """Place in the queue. Higher priority first, then age."""

    project: Slug = "default"
    priority: Annotated[int, Field(ge=0, le=100)] = 50
    preemptible: bool = True
    depends_on: tuple[str, ...] = Field((), max_length=100, description="Jobs that must succeed first.")
    deadline_s: Annotated[float, Field(gt=0.0, le=3.2e7)] | None = Field(
        None, description="Seconds of running time after which the job fails with DEADLINE."
    )


class Retry(Strict):
    """User errors are not retried by default; infrastructure losses have a budget that refills after progress."""

    max_user_failures: Annotated[int, Field(ge=0, le=100)] = 0
    max_infra_failures: Annotated[int, Field(ge=0, le=1000)] = 10
