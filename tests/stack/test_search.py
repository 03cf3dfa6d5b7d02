"""Searches on real parts: Ray Tune, plain actors in its placement groups, real images."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import vit
from configs.resolve import load_resolved
from configs.spec import SearchJob
from orchestrator.client import Client
from orchestrator.connection import Unreachable
from orchestrator.embedded.stack import Stack
from orchestrator.fetch import fetch
from orchestrator.schemas import JobPublic
from tests.stack.jobs import finished, pretraining, running_attempt, until
from workers.search.samplers import Outcome, make_sampler

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1200)]
DEADLINE_S = 400.0
"""Several trainings follow one another here: longer than other tests wait."""


def searching(**fields: Any) -> dict[str, Any]:
    """A search over the learning rate of a tiny model: trials of one worker and 24 steps, judged on held-out images."""
    base = pretraining(
        schedule={"total_steps": 24, "warmup_steps": 2},
        resources={"workers": 1, "gpus_per_worker": 0},
        checkpoint={"every_steps": 8, "keep_last": 3},
        eval={"every_steps": 8, "batch_size": 500},
        data__holdout={"fraction": 0.02},
        data__subset=None,
        data__augment={"crop": "resize"},
        zero={"stage": 0},
    )
    return {
        "kind": "search",
        "name": "small search",
        "base": base,
        "space": {"optim.lr": {"type": "log_uniform", "low": 1e-5, "high": 1e-2}},
        "budget": {"trials": 2},
        "concurrency": 1,
        **fields,
    }


def ended(client: Client, job_id: str) -> JobPublic:
    return finished(client, job_id, DEADLINE_S)


def trial_job(client: Client, search_id: str, number: int, deadline_s: float = DEADLINE_S) -> str:
    """The job of a trial, once that was made."""

    def probe() -> str | None:
        return next((t.job_id for t in client.searches.trials(search_id) if t.number == number), None)

    return until(f"trial {number}", probe, deadline_s)


def assert_nothing_is_placed(stack: Stack) -> None:
    """No placement group and no live actor on the cluster."""
    (ray,) = [watched.part for watched in stack._watched if watched.part.name == "ray-head"]
    with httpx.Client(base_url=ray.address, headers=ray.headers, trust_env=False, timeout=60) as http:  # type: ignore[attr-defined]

        def left(kind: str, gone: str) -> list[str]:
            rows = http.get(f"/api/v0/{kind}", params={"limit": 1000}).json()["data"]["result"]["result"]
            return [str(row) for row in rows if row["state"] != gone]

        until("placement groups gone", lambda: not left("placement_groups", "REMOVED"), 60)
        until("actors gone", lambda: not left("actors", "DEAD"), 60)


def test_a_search_loses_a_worker_and_no_trial(client: Client, stack: Stack, tmp_path: Path) -> None:
    grid = {"optim.lr": {"type": "grid", "values": [1e-6, 3e-3]}}
    asked = searching(space=grid, algorithm="grid", final={}, name="lossy")
    # Long enough to be hit on its way.
    asked["base"] |= {
        "schedule": {"total_steps": 120, "warmup_steps": 2},
        "checkpoint": {"every_steps": 40, "keep_last": 3},
        "eval": {"every_steps": 40, "batch_size": 500},
    }
    search = client.jobs.create(asked)
    first = trial_job(client, search.id, 1)
    attempt = running_attempt(client, first, 3, DEADLINE_S)
    os.kill(attempt.ranks[0].pid, signal.SIGKILL)
    job = ended(client, search.id)

    trials = client.searches.trials(search.id, curves=True)
    assert [(t.number, t.role, t.state) for t in trials] == [
        (1, "trial", "SUCCEEDED"),
        (2, "trial", "SUCCEEDED"),
        (3, "final", "SUCCEEDED"),
    ]
    assert [step for step, _ in trials[0].curve] == [40, 80, 120]
    assert [a.exit_reason for a in client.jobs.get(first).attempts] == ["WORKER_LOST", "COMPLETED"]
    best = client.searches.best(search.id)
    assert (best.number, best.params) == (2, {"optim.lr": 3e-3})
    assert "Best is trial 2" in job.message
    assert client.jobs.get(trials[2].job_id).spec["data"]["holdout"] is None

    report, picture = client.searches.report(search.id), io.BytesIO()
    assert [setting.params["optim.lr"] for setting in report.settings] == [3e-3, 1e-6]
    assert report.final is not None
    assert client.searches.write_picture(search.id, picture) > 10_000
    assert picture.getvalue().startswith(b"\x89PNG")
    # Its checkpoint is an ordinary one.
    fetched = fetch(client, f"{best.job_id}/best", tmp_path / "model")
    assert vit.load(fetched.folder).config.embed_dim == 32
    assert_nothing_is_placed(stack)


def driver_pid(client: Client, job_id: str) -> int:
    """The process that reports for the search's last attempt."""

    def probe() -> int | None:
        attempts = client.jobs.get(job_id).attempts
        return attempts[-1].ranks[0].pid if attempts and attempts[-1].ranks else None

    return until("the driver reports", probe, DEADLINE_S)


def trains(client: Client, job_id: str) -> None:
    """Until a trial's job has done a step, or ended."""
    until(f"{job_id} trains", lambda: (j := client.jobs.get(job_id)).is_terminal or j.progress.step > 0, DEADLINE_S)


def answers(client: Client, job_id: str) -> bool:
    try:
        client.jobs.get(job_id)
    except Unreachable:
        return False
    return True


def search_whose_driver_and_api_die(
    client: Client, stack: Stack, num_trials: int, driver_at: int, api_at: int
) -> list[str | None]:
    """Kills a search's driver while one trial runs, and the API while another does: it ends as if nothing had been,
    with every trial once and the settings of an undisturbed run. Returns how its attempts ended."""
    asked = searching(algorithm="tpe", budget={"trials": num_trials}, concurrency=1, seed=3, name="killed")
    search = client.jobs.create(asked)
    trains(client, trial_job(client, search.id, driver_at))
    os.kill(driver_pid(client, search.id), signal.SIGKILL)
    trains(client, trial_job(client, search.id, api_at))
    (server,) = psutil.Process(stack.pid("API")).children()
    os.kill(server.pid, signal.SIGKILL)
    until("the API answers again", lambda: answers(client, search.id), DEADLINE_S)
    job = ended(client, search.id)
    reasons = [attempt.exit_reason for attempt in job.attempts]
    assert reasons == ["DRIVER_LOST", "COMPLETED"]
    assert_as_undisturbed(client, job, num_trials)
    return reasons


def assert_as_undisturbed(client: Client, job: JobPublic, num_trials: int) -> None:
    """Of a search that tried one setting after the other: each trial once, with the setting that the ends of those
    before it give."""
    trials = client.searches.trials(job.id)
    assert [(t.number, t.state) for t in trials] == [(n, "SUCCEEDED") for n in range(1, num_trials + 1)]
    assert len({t.job_id for t in trials}) == num_trials, "a trial was run as two"
    spec = load_resolved(job.spec)
    assert isinstance(spec, SearchJob)
    sampler = make_sampler(spec)
    for index, trial in enumerate(trials):
        assert sampler.ask(index) == trial.params, f"trial {trial.number} has another setting"
        sampler.tell(index, trial.params, Outcome(trial.value, trial.step))


def test_a_search_outlives_its_driver_and_the_api(client: Client, stack: Stack) -> None:
    # The third setting is the first that depends on how others ended.
    reasons = search_whose_driver_and_api_die(client, stack, 3, driver_at=1, api_at=2)
    assert reasons == ["DRIVER_LOST", "COMPLETED"]


def test_a_search_makes_room_for_a_job_that_waits(client: Client, stack: Stack) -> None:
    grid = {"optim.lr": {"type": "grid", "values": [1e-3, 2e-3, 3e-3, 4e-3]}}
    asked = searching(space=grid, algorithm="grid", budget={"trials": 4}, concurrency={"min": 1, "max": 2})
    asked["base"]["schedule"] = {"total_steps": 60, "warmup_steps": 2}
    # All but one CPU are taken when it begins: one trial at a time.
    cpus = int(sum(node.cpus for node in client.cluster().nodes))
    large = {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": cpus - 1}
    first = client.jobs.create(pretraining(resources=large, schedule__total_steps=20))
    running_attempt(client, first.id, 1, DEADLINE_S)
    search = client.jobs.create(asked)
    trains(client, trial_job(client, search.id, 1))
    finished(client, first.id, DEADLINE_S)
    until("it takes what is free", lambda: client.searches.get(search.id).places == 2, DEADLINE_S)
    # Another job that needs all but one: it starts while the search goes on, with one trial at a time.
    other = client.jobs.create(pretraining(resources=large, schedule__total_steps=20))
    until("it falls back", lambda: client.searches.get(search.id).places == 1, DEADLINE_S)
    running_attempt(client, other.id, 1, DEADLINE_S)
    assert not client.jobs.get(search.id).is_terminal, "it ended before the other job began: nothing is shown"
    finished(client, other.id, DEADLINE_S)
    job = ended(client, search.id)
    assert len(job.attempts) == 1
    assert [t.state for t in client.searches.trials(search.id)] == ["SUCCEEDED"] * 4
    assert [e.data["places"] for e in client.jobs.events(search.id) if e.type == "search.places"][:2] == [2, 1]
    assert_nothing_is_placed(stack)


def test_asha_stops_the_worse_half_and_a_pause_holds_all(client: Client) -> None:
    grid = {"optim.lr": {"type": "grid", "values": [3e-3, 1e-6, 1e-7]}}
    asha = {"name": "asha", "grace_steps": 8, "reduction": 2}
    search = client.jobs.create(searching(space=grid, algorithm="grid", scheduler=asha, budget={"trials": 3}))
    trial_job(client, search.id, 1)
    client.jobs.pause(search.id)
    until("paused", lambda: client.jobs.get(search.id).state == "PAUSED", DEADLINE_S)
    # Wherever the first one was: before its start, under way, or at its end.
    assert all(t.state in ("QUEUED", "SUCCEEDED") for t in client.searches.trials(search.id))
    client.jobs.resume(search.id)
    ended(client, search.id)
    trials = client.searches.trials(search.id)
    assert [(t.state, t.reason) for t in trials] == [
        ("SUCCEEDED", "COMPLETED"),
        ("CANCELLED", "STOPPED_EARLY"),
        ("CANCELLED", "STOPPED_EARLY"),
    ]
    assert trials[1].message.startswith("asha: at rung 8 its value")
    assert trials[1].value is not None
    assert trials[1].step < 24
    assert client.searches.best(search.id).number == 1
