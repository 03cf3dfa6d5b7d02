"""Jobs whose drivers report, for tests of what becomes of their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from configs.ids import attempt_id
from configs.states import JobState
from configs.wire import MetricPoint, ReportBatch
from orchestrator.control.transitions import transition
from orchestrator.services.reports import ingest_report
from orchestrator.storage.db import Database
from orchestrator.storage.tables import AttemptRow, JobRow
from tests.factories import NOW, add_job, make_attempt, make_spec


class ReportedJob:
    """A job that runs; `report` is what its driver says."""

    def __init__(self, db: Database, **fields: object) -> None:
        self.db = db
        spec = make_spec(optim={"lr": 3e-4, "betas": [0.9, 0.999]}, model={"variant": "Ti/4", "gelu": None})
        self.id = add_job(db, spec, **fields).id
        self.attempt = 0
        self._seq = 0
        self.begin(0)

    def begin(self, from_step: int) -> None:
        """Begin another attempt, at this step."""
        self.attempt += 1
        self._seq = 0
        with self.db.session() as session:
            job = session.get_one(JobRow, self.id)
            session.add(make_attempt(job, self.attempt, from_step=from_step, to_step=from_step))
            job.num_attempts = self.attempt
            if self.attempt == 1:
                transition(session, job, JobState.PREPARING, actor="test", at=NOW)
                transition(session, job, JobState.RUNNING, actor="test", at=NOW)

    def report(self, points: Mapping[tuple[str, int], float | None] | None = None) -> None:
        """One report with these points: (name, step) -> value. A point's time is NOW and so many seconds."""
        self._seq += 1
        metrics = tuple(
            MetricPoint(name=name, step=step, value=value, at=NOW + timedelta(seconds=step, minutes=self.attempt))
            for (name, step), value in (points or {}).items()
        )
        ingest_report(self.db, attempt_id(self.id, self.attempt), ReportBatch(seq=self._seq, metrics=metrics))

    def losses(self, *steps: int) -> None:
        """A report for each step: train/loss = step + attempt / 8, train/lr = 1 / 2**step."""
        for step in steps:
            self.report({("train/loss", step): step + self.attempt / 8, ("train/lr", step): 2.0**-step})

    def end(self, state: JobState = JobState.SUCCEEDED) -> None:
        with self.db.session() as session:
            transition(session, session.get_one(JobRow, self.id), state, actor="test", at=NOW + timedelta(hours=1))

    def from_steps(self) -> dict[int, int]:
        with self.db.reader() as session:
            return {a.number: a.from_step for a in session.query(AttemptRow).where(AttemptRow.job_id == self.id)}


def loss(step: int, attempt: int) -> float:
    return step + attempt / 8
