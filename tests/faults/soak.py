"""`make soak MINUTES=n`: a real job on the real stack while its parts are killed at random; then the same weights.

The job is trained once undisturbed and once under fire. Under fire, every 10 to 30 seconds one of rank, driver, API,
controller, object store and Ray head gets SIGKILL, or a rank SIGSTOP: first each of these seven, in an order that the
seed chooses, then any of them; after two hits without a new checkpoint it waits for one. At the end: weights, moments
and every logged loss that is there bit-equal, one lineage, no process left. Exits with 1 where that does not hold.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from orchestrator.client import ApiError, Client
from orchestrator.connection import PatchworkError
from orchestrator.embedded.data_dir import DataDir
from orchestrator.embedded.stack import Stack
from orchestrator.schemas import JobPublic
from tests.faults.conftest import NODE_SETTINGS, SETTINGS
from tests.stack.jobs import fashion_mnist_folder, final_weights, pretraining, series

VICTIMS = ("rank", "stop a rank", "driver", "API", "controller", "object-store", "ray-head")
ALL_FROM_MINUTES = 6.0
"""From so many minutes on every kind of victim has to be hit."""
LOOK_AGAIN_S = 1.0
EVERY = 50
"""Steps from one checkpoint to the next."""
IN_VAIN = 2
"""So many hits may come before the job has a new checkpoint: on a busy machine it would never end otherwise."""
STEPS_PER_MINUTE = 1200
"""Of this job on two cores; the soak lasts as long as the job does."""


class Soak:
    def __init__(self, stack: Stack, client: Client, seed: int) -> None:
        self.stack = stack
        self.client = client
        self.random = random.Random(seed)
        self.hits: Counter[str] = Counter()
        self.first = self.random.sample(VICTIMS, len(VICTIMS))
        """Who is still to be hit before chance decides."""
        self.reached = 0
        """The newest checkpoint's number, as far as steps tell."""
        self.in_vain = 0
        self.begun = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begun:7.1f} s  {text}", flush=True)

    def job(self, job_id: str) -> JobPublic | None:
        """None while the API is away."""
        try:
            return self.client.jobs.get(job_id)
        except (ApiError, PatchworkError, OSError):
            return None

    def run(self, steps: int, harm: bool) -> JobPublic:
        spec = pretraining(schedule__total_steps=steps, checkpoint__every_steps=EVERY, checkpoint__keep_last=2)
        spec |= {"name": "under fire" if harm else "undisturbed", "retry": {"max_infra_failures": 1000}}
        spec["train"]["log_every_steps"] = 50
        self.reached = self.in_vain = 0
        job_id = self.client.jobs.create(spec).id
        next_at = time.monotonic() + 15.0
        shown = 0.0
        while True:
            job = self.job(job_id)
            if job is not None and job.is_terminal:
                return job
            if job is not None and time.monotonic() - shown > 5.0:
                shown = time.monotonic()
                self.say(f"{job.state}, step {job.progress.step} of {steps}, attempt {job.num_attempts}")
            self.note_progress(job)
            if harm and time.monotonic() > next_at and self.in_vain < IN_VAIN:
                pause_s = self.random.uniform(10.0, 30.0) if self.harm(job) else LOOK_AGAIN_S
                next_at = time.monotonic() + pause_s
            time.sleep(0.5)

    def note_progress(self, job: JobPublic | None) -> None:
        reached = job.attempts[-1].to_step // EVERY if job is not None and job.attempts else 0
        if reached > self.reached:
            self.reached, self.in_vain = reached, 0

    def harm(self, job: JobPublic | None) -> bool:
        """Hit the next victim. False: there is none now (it is just being started); look for the same one again."""
        victim = self.first[0] if self.first else self.random.choice(VICTIMS)
        pid = self.find(victim, job)
        if pid is None:
            return False
        number = signal.SIGSTOP if victim == "stop a rank" else signal.SIGKILL
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        if self.first:
            self.first.pop(0)
        self.hits[victim] += 1
        self.in_vain += 1
        self.say(f"{number.name} to {victim} ({pid})")
        return True

    def find(self, victim: str, job: JobPublic | None) -> int | None:
        if victim in ("rank", "stop a rank"):
            last = job.attempts[-1] if job is not None and job.attempts else None
            pids = [rank.pid for rank in last.ranks] if last is not None and last.state != "ENDED" else []
            # The number of a process that has ended may be another's.
            pid = self.random.choice(pids) if pids else None
            return pid if pid in {process.pid for process in self.below_ray()} else None
        try:
            if victim == "driver":
                below = self.below_ray()
                return next((p.pid for p in below if "workers.driver" in p.cmdline()), None)
            children = psutil.Process(self.stack.pid(victim)).children()
            return children[0].pid if children else None
        except (psutil.NoSuchProcess, AssertionError):
            return None  # it is just being started again

    def below_ray(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.stack.pid("ray-head")).children(recursive=True)
        except (psutil.NoSuchProcess, AssertionError):
            return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="about how long (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error(f"--minutes {arguments.minutes}: expected more than 0")
    folder = Path(tempfile.mkdtemp(prefix="pw-soak-"))
    (folder / "data").mkdir()
    (folder / "data" / "fashion-mnist").symlink_to(fashion_mnist_folder())
    stack = Stack(
        DataDir(folder / "stack"),
        port=0,
        num_cpus=4,
        data_root=folder / "data",
        settings=SETTINGS,
        node_settings=NODE_SETTINGS,
        on_step=lambda part, state: print(f"{part}: {state}", flush=True),
    )
    stop = threading.Event()
    watcher: threading.Thread | None = None
    try:
        stack.start()
        with Client(stack.url, stack.token) as client:
            soak = Soak(stack, client, arguments.seed)
            watcher = threading.Thread(target=stack.watch, args=(soak.say, stop))
            watcher.start()
            return judge(soak, arguments.minutes)
    except KeyboardInterrupt:
        print("Interrupted; the stack is stopped.", flush=True)
        return 130
    finally:
        stop.set()
        if watcher is not None:
            watcher.join()
        stack.stop()
        shutil.rmtree(folder, ignore_errors=True)


def judge(soak: Soak, minutes: float) -> int:
    steps = max(200, round(minutes * STEPS_PER_MINUTE / 2))
    expected = soak.run(steps, harm=False)
    job = soak.run(steps, harm=True)
    losses, under_fire = (series(soak.client, run.id, "train/loss") for run in (expected, job))
    checks: dict[str, Callable[[], bool]] = {
        "both succeeded": lambda: expected.state == job.state == "SUCCEEDED",
        "somebody was hit": lambda: bool(soak.hits),
        "weights and moments are bit-equal": lambda: same(soak.client, expected.id, job.id),
        # Each attempt logs its first step besides.
        "every logged loss is there and the same": lambda: (
            bool(losses) and losses == {step: under_fire.get(step) for step in losses}
        ),
        "attempts follow one another": lambda: all(
            after.created_at >= (before.ended_at or after.created_at)
            for before, after in zip(job.attempts, job.attempts[1:], strict=False)
        ),
        "no process of it is left": lambda: (
            not any(psutil.pid_exists(rank.pid) for attempt in job.attempts for rank in attempt.ranks)
        ),
    }
    if minutes >= ALL_FROM_MINUTES:
        checks["every kind of victim was hit"] = lambda: set(soak.hits) == set(VICTIMS)
    hits = ", ".join(f"{n} x {what}" for what, n in sorted(soak.hits.items())) or "nobody"
    print(f"\n{steps} steps; hit: {hits}")
    for run, what in ((expected, "undisturbed"), (job, "under fire")):
        print(f"{what}: {elapsed_s(run):.0f} s")
    ends = Counter(attempt.exit_reason for attempt in job.attempts)
    print(f"{job.num_attempts} attempts: {', '.join(f'{n} x {reason}' for reason, n in ends.items())}")
    print(f"work lost: {job.usage.wasted_steps} steps, {job.usage.wasted_gpu_s:.1f} worker-seconds")
    good = True
    for what, check in checks.items():
        holds = check()
        good = good and holds
        print(f"{'ok  ' if holds else 'FAIL'}  {what}")
    if not good:
        for step in losses:
            if losses.get(step) != under_fire.get(step):
                print(f"step {step}: loss {losses.get(step)} undisturbed, {under_fire.get(step)} under fire")
        for event in soak.client.jobs.events(job.id):
            print(f"{event.at:%H:%M:%S}  {event.type}: {event.message}")
    return 0 if good else 1


def elapsed_s(job: JobPublic) -> float:
    return (job.ended_at - job.created_at).total_seconds() if job.ended_at is not None else float("nan")


def same(client: Client, one: str, other: str) -> bool:
    first, second = final_weights(client, one), final_weights(client, other)
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


if __name__ == "__main__":
    sys.exit(main())
