"""What a sink is: something outside that a job's metrics are written to, again and again until it has them.

SinkError
  SinkUnavailable   it is away, or its package is not installed: no job can be written now
  SinkRefused       it does not take what was written for this job
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from configs.states import JobState
from orchestrator.storage.arrivals import Arrival


class SinkError(Exception):
    """The metrics are not written. Messages may go to users: a sink leaves its `secrets` out, or names them there."""


class SinkUnavailable(SinkError):
    pass


class SinkRefused(SinkError):
    pass


@dataclass(frozen=True)
class SinkJob:
    """What sinks tell of a job besides its metrics."""

    id: str
    name: str
    kind: str
    project: str
    labels: Mapping[str, str]
    state: JobState
    reason: str | None
    spec_json: bytes
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None

    def spec(self) -> dict[str, Any]:
        """The resolved job description."""
        spec: dict[str, Any] = json.loads(self.spec_json)
        return spec

    def parameters(self) -> dict[str, str | int | float | bool]:
        """`spec`, flat: dotted keys to plain values; lists as JSON; what is null left out."""
        return dict(_flat(self.spec()))


@dataclass(frozen=True)
class Delivery:
    """What is to be written next. The same delivery may come again, or a longer one that begins alike, if it is not
    known whether the last one arrived."""

    job: SinkJob
    points: tuple[Arrival, ...]
    """In the order of arrival, whole reports of them."""
    from_steps: Mapping[int, int]
    """attempt -> the step it started from, of all attempts so far."""
    memory: Mapping[str, Any]
    """What the last `write` of this job returned; empty at first, and after starting over."""
    generation: int
    """Grows when the sink has to start over; whatever was written for a smaller one is void."""
    final: bool
    """The job has ended and these are its last points."""


class Sink(Protocol):
    """Called by one thread at a time."""

    @property
    def name(self) -> str: ...

    @property
    def takes_back(self) -> bool:
        """Whether it can drop steps that a later attempt repeats. If not, it never sees points known to be rolled back,
        and starts over (`Delivery.generation`) where they were written before that was known."""
        ...

    @property
    def every_s(self) -> float:
        """At most so often, while a job runs."""
        ...

    @property
    def secrets(self) -> tuple[str, ...]:
        """Texts that no message may hold."""
        ...

    def prepare(self) -> None:
        """Look whether anything can be written at all; called often. Raises SinkUnavailable."""
        ...

    def write(self, delivery: Delivery) -> dict[str, Any]:
        """Write the points and return what to remember (JSON). What is written twice is there once.

        Raises:
            SinkUnavailable, SinkRefused: some of it may be written; it comes again.
        """
        ...


def missing_package(sink: str, package: str, extra: str) -> SinkUnavailable:
    """The error that says what to install."""
    return SinkUnavailable(
        f"{sink} is configured, but the package {package} is not installed on the control plane: "
        f"pip install 'patchwork-vit[{extra}]'"
    )


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        yield key, json.dumps(value)
    elif value is not None:
        yield key, value
