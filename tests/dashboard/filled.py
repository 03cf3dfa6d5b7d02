"""A database filled with jobs, curves, attempts and events, as the rest of the system would leave them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import insert

from configs.ids import attempt_id, new_job_id
from configs.load import parse_spec
from configs.plan import plan
from configs.resolve import canonical_json, resolve, spec_hash, training_fingerprint
from configs.states import AttemptState, JobState
from orchestrator.services.auth import Actor
from orchestrator.services.submission import Request, card_for, submit_job
from orchestrator.storage.db import Database
from orchestrator.storage.tables import AttemptRow, ClusterRow, EventRow, JobRow, MetricRow, TrialRow
from tests.orchestrator.rows import add_checkpoint, spec_with

NOW = datetime.now(UTC)


def job_values(name: str, state: JobState, age_s: float, **changes: Any) -> dict[str, Any]:
    """Every column of a job of tests.orchestrator.rows, submitted `age_s` seconds ago."""
    made = NOW - timedelta(seconds=age_s)
    raw = spec_with(name=name)
    spec = parse_spec(raw)
    card = card_for(spec.data.source, {})  # type: ignore[union-attr]
    resolved = resolve(spec, card, None)
    stored = canonical_json(resolved)
    values: dict[str, Any] = {
        "id": new_job_id(),
        "kind": "pretrain",
        "name": name,
        "project": "default",
        "labels": {},
        "submitted": {"spec": raw, "overrides": {}},
        "spec_json": stored,
        "spec_hash": spec_hash(stored),
        "training_fingerprint": training_fingerprint(resolved, card.fingerprint),
        "plan": plan(spec, card).model_dump(mode="json"),
        "dataset": card.model_dump(mode="json"),
        "priority": 50,
        "total_steps": 100,
        "state": state.value,
        "state_since": made,
        "created_at": made,
        "created_by": "root",
        "desired": "run",
    }
    if state not in (JobState.QUEUED, JobState.PAUSED):
        values["started_at"] = made + timedelta(seconds=5)
    if state.is_terminal:
        values["ended_at"] = made + timedelta(seconds=60)
    return values | changes


def add_job(db: Database, name: str, state: JobState, age_s: float = 60.0, **changes: Any) -> str:
    """One job. Returns its id."""
    values = job_values(name, state, age_s, **changes)
    with db.session() as session:
        session.execute(insert(JobRow), [values])
        session.add(
            EventRow(job_id=values["id"], type="job.queued", message=f"{name} was submitted", actor="root", at=NOW)
        )
    return str(values["id"])


def add_many(db: Database, number: int) -> None:
    """So many finished jobs, a second apart."""
    one = job_values("job", JobState.SUCCEEDED, 0.0)
    for start in range(0, number, 5000):
        rows = [
            one | {"id": new_job_id(), "name": f"sweep-{i:06d}", "created_at": NOW - timedelta(days=1, seconds=i)}
            for i in range(start, min(number, start + 5000))
        ]
        with db.session() as session:
            session.execute(insert(JobRow), rows)


def add_curves(db: Database, job_id: str, num_steps: int, attempt: int = 1, first: int = 1) -> None:
    """Curves that look like training."""
    started = NOW - timedelta(seconds=num_steps)

    def points() -> Iterator[dict[str, Any]]:
        for step in range(first, num_steps + 1):
            at = started + timedelta(seconds=step)
            wave = math.sin(step * 12.9898) * 0.05
            values = {
                "train/loss": 2.3 * math.exp(-step / 60) + 0.4 + wave,
                "train/lr": 0.003 * min(1, step / 20) * (0.5 + 0.5 * math.cos(step / max(num_steps, 1) * math.pi)),
                "train/grad_norm": 1.5 + wave * 8,
                "perf/images_per_s": 1800 + wave * 900,
                "perf/data_wait": 0.03 + abs(wave) / 10,
                "perf/step_time_s/rank-00000": 0.034 + wave / 100,
                "perf/step_time_s/rank-00001": 0.035 + wave / 90,
            }
            if step % 10 == 0:
                values |= {"eval/top1": 0.9 - 0.8 * math.exp(-step / 40), "eval/loss": 2.2 * math.exp(-step / 70) + 0.5}
            for name, value in values.items():
                yield {"job_id": job_id, "name": name, "step": step, "attempt": attempt, "value": value, "at": at}

    with db.session() as session:
        session.execute(insert(MetricRow), list(points()))


def add_attempt(db: Database, job_id: str, number: int = 1, **fields: Any) -> str:
    values: dict[str, Any] = {
        "id": attempt_id(job_id, number),
        "job_id": job_id,
        "number": number,
        "state": AttemptState.RUNNING,
        "world_size": 2,
        "nodes": ["node-a", "node-a"],
        "created_at": NOW - timedelta(seconds=100),
        "phase": "training",
        **fields,
    }
    with db.session() as session:
        session.add(AttemptRow(**values))
        session.get_one(JobRow, job_id).num_attempts = number
    return str(values["id"])


def add_search(db: Database, num_trials: int) -> str:
    """A running search over two fields, all but its last trial ended. Returns its id."""
    base = spec_with(eval={"every_steps": 10}, checkpoint={"every_steps": 10})
    space = {
        "optim.lr": {"type": "log_uniform", "low": 1e-4, "high": 1e-1},
        "optim.name": {"type": "choice", "values": ["adamw", "sgd"]},
    }
    spec = {
        "kind": "search",
        "name": "lr-and-optimizer",
        "base": base,
        "space": space,
        "budget": {"trials": num_trials},
    }
    search_id = submit_job(db, Actor("tok_test", "root", "admin"), Request(spec, {}), None).job_id
    one = job_values("trial", JobState.SUCCEEDED, 60.0, search_id=search_id, step=100, num_attempts=1)
    jobs, attempts, trials, points = [], [], [], []
    for number in range(1, num_trials + 1):
        job_id = new_job_id()
        params = {"optim.lr": 10 ** (-4 + 3 * number / num_trials), "optim.name": ("adamw", "sgd")[number % 2]}
        last = {"state": JobState.RUNNING.value, "ended_at": None} if number == num_trials else {}
        jobs.append(one | last | {"id": job_id, "name": f"lr-{number}"})
        ended = {"id": attempt_id(job_id, 1), "job_id": job_id, "number": 1, "state": "ENDED", "to_step": 100}
        attempts.append(ended | {"world_size": 1, "nodes": ["node-a"], "created_at": NOW, "phase": "training"})
        trials.append(
            {"search_id": search_id, "number": number, "job_id": job_id, "role": "trial", "setting": number - 1}
            | {"repeat": 0, "params": params, "asked_after": 0, "told": number}
        )
        for step in range(10, 101, 10):
            value = (0.9 - 0.1 * abs(number / num_trials - 0.6)) * (1 - math.exp(-step / 30))
            metric = {"job_id": job_id, "name": "eval/top1", "step": step, "attempt": 1, "value": value, "at": NOW}
            points.append(metric)
    with db.session() as session:
        session.get_one(JobRow, search_id).state = JobState.RUNNING
        for table, rows in ((JobRow, jobs), (AttemptRow, attempts), (TrialRow, trials), (MetricRow, points)):
            session.execute(insert(table), rows)
    return search_id


def add_cluster(db: Database, **fields: Any) -> None:
    """A cluster of one node that answers, and a controller that lives."""
    node = {"id": "0" * 40 + "node", "alive": True, "host": "node-a", "cpus": 8.0, "gpus": 0.0, "is_head": True}
    values: dict[str, Any] = {
        "id": 1,
        "cluster_id": "session_1",
        "reachable": True,
        "nodes": [node],
        "seen_at": datetime.now(UTC),
        "controller_at": datetime.now(UTC),
        **fields,
    }
    with db.session() as session:
        session.merge(ClusterRow(**values))


def fill(db: Database) -> dict[str, str]:
    """A little of everything. Returns job ids by name."""
    add_cluster(db)
    ids = {
        "running": add_job(
            db,
            "vit-s16-imagenet",
            JobState.RUNNING,
            600,
            step=70,
            num_attempts=2,
            labels={"team": "vision"},
            last_metrics={"train/loss": 1.02, "eval/top1": 0.41, "perf/images_per_s": 1812.0, "perf/mfu": 0.38},
        ),
        "queued": add_job(db, "finetune-flowers", JobState.QUEUED, 120, priority=70),
        "failed": add_job(
            db,
            "too-large",
            JobState.FAILED,
            3600,
            reason="OOM_GPU",
            message="CUDA out of memory on rank 1",
            ended_at=NOW - timedelta(seconds=3000),
        ),
        "done": add_job(db, "vit-ti16-baseline", JobState.SUCCEEDED, 7200, step=100, last_metrics={"eval/top1": 0.87}),
    }
    failure = {"message": "a worker was lost", "first_failure": None}
    add_attempt(
        db,
        ids["running"],
        1,
        state=AttemptState.ENDED,
        to_step=45,
        exit_reason="WORKER_LOST",
        exit=failure,
        ended_at=NOW - timedelta(seconds=60),
        wasted_steps=5,
        first_step_at=NOW - timedelta(seconds=90),
    )
    add_attempt(
        db,
        ids["running"],
        2,
        from_step=40,
        to_step=70,
        report_seq=9,
        first_step_at=NOW - timedelta(seconds=30),
        last_progress_at=NOW,
        created_at=NOW - timedelta(seconds=55),
    )
    add_curves(db, ids["running"], 45, attempt=1)
    add_curves(db, ids["running"], 70, attempt=2, first=41)
    add_attempt(db, ids["done"], 1, state=AttemptState.ENDED, to_step=100, exit_reason="COMPLETED", ended_at=NOW)
    add_curves(db, ids["done"], 100)
    for step in (20, 40):
        add_checkpoint(db, ids["running"], step, created_at=NOW)
    return ids
