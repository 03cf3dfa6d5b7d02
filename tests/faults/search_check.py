"""Searches whose parts are killed, on real parts: `python -m tests.faults.search_check [--only NAME] [--trials N]`.

    killed       SIGKILL of the search's driver and of the API; TPE gives the settings of an undisturbed run
    head         SIGKILL of Ray's head: the search goes on, on the cluster that comes after it
    population   population-based training: the worse one is replaced, from the better one's checkpoint
    leaks        many tiny trials: no placement group, actor, process or temporary directory is left

Prints what each took and found; exits with 1 at the first that does not hold.
"""

from __future__ import annotations

import argparse
import getpass
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from configs.ids import parse_checkpoint_id
from configs.resolve import load_resolved
from configs.spec import SearchJob
from orchestrator.client import Client
from orchestrator.embedded.stack import Stack
from orchestrator.schemas import JobPublic
from tests.stack.running import running_stack
from tests.stack.test_search import (
    assert_as_undisturbed,
    assert_nothing_is_placed,
    search_whose_driver_and_api_die,
    searching,
    trains,
    trial_job,
)
from workers.search.samplers import make_sampler

DEADLINE_S = 1800.0


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def succeeded(client: Client, job_id: str) -> JobPublic:
    job = client.jobs.wait(job_id, DEADLINE_S, poll_s=0.5)
    events = "\n".join(f"{e.type}: {e.message}" for e in client.jobs.events(job_id))
    check(job.state == "SUCCEEDED", f"{job.state} {job.reason}: {job.message}\n{events}")
    return job


# -- the scenarios -----------------------------------------------------------------------------------------------------
def killed(client: Client, stack: Stack, num_trials: int) -> str:
    attempts = search_whose_driver_and_api_die(client, stack, num_trials, driver_at=2, api_at=4)
    return f"{num_trials} trials, each once, with the settings of an undisturbed run; attempts ended {attempts}"


def head(client: Client, stack: Stack, num_trials: int) -> str:
    asked = searching(algorithm="tpe", budget={"trials": num_trials}, concurrency=1, seed=3, name="headless")
    search = client.jobs.create(asked)
    trains(client, trial_job(client, search.id, 2))
    (server,) = [
        process
        for process in psutil.Process(stack.pid("ray-head")).children(recursive=True)
        if "gcs_server" in process.name()
    ]
    server.kill()
    job = succeeded(client, search.id)
    assert_as_undisturbed(client, job, num_trials)
    lost = [a.exit_reason for t in client.searches.trials(search.id) for a in client.jobs.get(t.job_id).attempts]
    attempts = [attempt.exit_reason for attempt in job.attempts]
    check(len(attempts) == 2, f"attempts ended {attempts}")
    return f"{num_trials} trials, each once; attempts ended {attempts}, of trials {lost}"


def population(client: Client, stack: Stack, num_trials: int) -> str:
    space = {"optim.lr": {"type": "log_uniform", "low": 1e-6, "high": 1e-2}}
    asked = searching(
        scheduler={"name": "pbt", "interval_steps": 40, "quantile": 0.5, "resample_probability": 0.0},
        space=space,
        budget={"trials": 2},
        concurrency=2,
        seed=seed_of_a_good_and_a_bad_one(space),
        name="population",
    )
    asked["base"] |= {
        "schedule": {"total_steps": 200, "warmup_steps": 2},
        "checkpoint": {"every_steps": 40, "keep_last": 10},
        "eval": {"every_steps": 40, "batch_size": 500},
    }
    search = client.jobs.create(asked)
    succeeded(client, search.id)
    trials = {t.number: t for t in client.searches.trials(search.id, curves=True)}
    made = [t for t in trials.values() if t.parent is not None]
    check(bool(made), "nobody was replaced")
    for trial in made:
        assert trial.parent is not None
        assert trial.replaces is not None
        replaced, parent = trials[trial.replaces], trials[trial.parent]
        check(replaced.reason == "STOPPED_EARLY" and replaced.message.startswith("pbt: at step"), replaced.message)
        ratio = trial.params["optim.lr"] / parent.params["optim.lr"]
        check(min(abs(ratio - 1.2), abs(ratio - 1 / 1.2)) < 1e-6, f"learning rate changed by {ratio}")
        first = client.jobs.get(trial.job_id).attempts[0]
        source, step, _ = parse_checkpoint_id(first.from_checkpoint or "")
        check((source, step) == (parent.job_id, first.from_step), "it began elsewhere")
    ended = [t for t in trials.values() if t.state == "SUCCEEDED"]
    check(len(ended) == 2, f"{len(ended)} members came to their end")
    check(all((t.value or 0) > (trials[2].value or 0) for t in ended), "no better than the bad one")
    return f"{len(made)} replaced; values {[round(t.value or 0, 3) for t in trials.values()]}"


def seed_of_a_good_and_a_bad_one(space: dict[str, Any]) -> int:
    """Of a population of two, one that learns and one that does not."""
    for seed in range(1000):
        search = load_resolved(searching(space=space, seed=seed))
        assert isinstance(search, SearchJob)
        sampler = make_sampler(search)
        rates = [(sampler.ask(index) or {})["optim.lr"] for index in range(2)]
        if 2e-3 < rates[0] < 6e-3 and rates[1] < 1e-5:
            return seed
    raise AssertionError("no such seed")


def leaks(client: Client, stack: Stack, num_trials: int) -> str:
    asked = searching(budget={"trials": num_trials}, concurrency=4, name="leaks")
    asked["base"]["schedule"] = {"total_steps": 2}
    asked["base"]["checkpoint"] = {}
    asked["base"]["eval"] = {"batch_size": 500}
    before = set(os.listdir(tempfile.gettempdir()))
    began = time.monotonic()
    search = client.jobs.create(asked)
    succeeded(client, search.id)
    took_s = time.monotonic() - began
    check(len(client.searches.trials(search.id)) == num_trials, "another number of trials")
    assert_nothing_is_placed(stack)
    # torch keeps one folder of compiled kernels for each user, however many trials there are.
    kept = {f"torchinductor_{getpass.getuser()}"}
    left = sorted(set(os.listdir(tempfile.gettempdir())) - before - kept)
    check(not left, f"left in the temporary directory: {left}")
    ours = f"ray::{'RankProcess'}"
    running = [p.pid for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0].startswith(ours)]
    check(not running, f"processes {running}")
    return f"{num_trials} trials in {took_s:.0f} s, 4 side by side; nothing left"


SCENARIOS: dict[str, Callable[[Client, Stack, int], str]] = {
    "killed": killed,
    "head": head,
    "population": population,
    "leaks": leaks,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=SCENARIOS, action="append")
    parser.add_argument("--trials", type=int, default=None, help="default: 8, and 50 in leaks")
    given = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="pw-"))
    # For this program and all it starts: what others leave in the system's one is not looked at.
    temporary = folder / "t"
    temporary.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    try:
        with running_stack(num_cpus=8, folder=folder) as (stack, _), Client(stack.url, stack.token) as client:
            for name in given.only or SCENARIOS:
                began = time.monotonic()
                found = SCENARIOS[name](client, stack, given.trials or (50 if name == "leaks" else 8))
                print(f"{name}: {found} ({time.monotonic() - began:.0f} s)", flush=True)
    except AssertionError as error:
        print(f"does not hold: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
