"""From submit to the first step: a job through the whole service, against `ray job submit` of a script that starts the
same workers on the same Ray cluster, imports the same libraries, builds the same model and does one step.

Ours is timed from the call of the client to the rank's own note of the first step's loss, the script's from the request
to Ray's REST API to rank 0's own note. Both leave the cluster as they found it before the other begins; Ray's idle
worker processes are there for both.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import select

from orchestrator.client import Client
from orchestrator.embedded.stack import Stack
from orchestrator.storage.db import Database
from orchestrator.storage.tables import MetricRow
from tests.benchmarks.harness import Row, arguments, interleave, progress, report
from tests.stack.jobs import finished, pretraining, until
from tests.stack.running import DATA, ray_client, running_stack

OURS, SCRIPT, EXTRA = "Patchwork", "ray job submit", "Patchwork less ray job submit"
GOAL_S = 1.0
DEADLINE_S = 600.0
IDLE_S = 2.0


def spec() -> dict[str, Any]:
    return pretraining(schedule__total_steps=1, schedule__warmup_steps=0, checkpoint={}, eval__at_end=False)


class Starts:
    """Both contenders on one stack. Each call is one start, in seconds; the parts of it are kept in `parts`."""

    def __init__(self, stack: Stack, client: Client, folder: Path) -> None:
        self._client = client
        self._database = Database(f"sqlite:///{stack.dir.database}")
        self._ray = ray_client(stack)
        self._folder = folder
        self.parts: dict[str, list[dict[str, float]]] = {OURS: [], SCRIPT: []}

    def ours(self) -> float:
        began = time.time()
        job = self._client.jobs.create(spec())
        reached = {"accepted": time.time()}
        finished(self._client, job.id, DEADLINE_S)
        with self._database.session() as session:
            query = select(MetricRow.at).where(MetricRow.job_id == job.id, MetricRow.name == "train/loss")
            reached["first step"] = _seconds(session.scalars(query.order_by(MetricRow.step)).first())
        for event in self._client.jobs.events(job.id):
            reached.setdefault(event.type, event.at.timestamp())
        for line in self._client.jobs.log_lines(job.id, tail=1000):
            reached.setdefault(f"{line.stream}: {line.msg[:60]}", line.t.timestamp())
        return self._end(OURS, began, reached)

    def script(self) -> float:
        folder = self._folder / uuid.uuid4().hex
        folder.mkdir()
        (folder / "spec.json").write_text(json.dumps(spec()))
        out = folder / "reached.json"
        words = ["python", "-m", "tests.benchmarks.start_script", folder / "spec.json", out, self._folder / DATA]
        began = time.time()
        answer = self._ray.post("/api/jobs/", json={"entrypoint": " ".join(map(str, words))})
        answer.raise_for_status()
        reached = {"accepted": time.time()}
        path = f"/api/jobs/{answer.json()['submission_id']}"

        def is_over() -> bool:
            state = self._ray.get(path).raise_for_status().json()
            if state["status"] in ("FAILED", "STOPPED"):
                raise RuntimeError(f"{state['status']}: {self._ray.get(path + '/logs').text[-4000:]}")
            return bool(state["status"] == "SUCCEEDED")

        until("the end of the script", is_over, DEADLINE_S)
        return self._end(SCRIPT, began, reached | json.loads(out.read_text()))

    def _end(self, name: str, began: float, reached: dict[str, float]) -> float:
        parts = {part: at - began for part, at in sorted(reached.items(), key=lambda item: item[1])}
        self.parts[name].append(parts)
        time.sleep(IDLE_S)  # what has ended leaves the machine
        return parts["first step"]

    def close(self) -> None:
        self._ray.close()
        self._database.close()


def _seconds(at: datetime | None) -> float:
    assert at is not None, "the job reported no loss"
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each part that all runs have, in order."""
    common = set.intersection(*map(set, runs))
    found = {part: median(run[part] for run in runs) for part in common}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def on_stack(work: Callable[[Starts], Any]) -> Any:
    """`work` on a stack of its own, which is gone afterwards."""
    with running_stack(num_cpus=4) as (stack, folder), Client(stack.url, stack.token) as client:
        starts = Starts(stack, client, folder)
        try:
            return work(starts)
        finally:
            starts.close()


def main(argv: list[str]) -> int:
    given = arguments(__doc__ or "", repetitions=5).parse_args(argv)

    def work(starts: Starts) -> tuple[dict[str, list[float]], dict[str, list[dict[str, float]]]]:
        contenders = {OURS: starts.ours, SCRIPT: starts.script}
        progress("one start of each, to warm up")
        interleave(contenders, 1)
        for runs in starts.parts.values():
            runs.clear()
        return interleave(contenders, given.repetitions), starts.parts

    values, parts = on_stack(work)
    extra = [ours - script for ours, script in zip(values[OURS], values[SCRIPT], strict=True)]
    rows = [
        Row(OURS, "s", values[OURS], SCRIPT),
        Row(SCRIPT, "s", values[SCRIPT]),
        Row(EXTRA, "s", extra),
    ]
    report("start_latency", "From submit to the first step", rows, given.out, {"parts": parts})
    print(f"\ngoal, at most {GOAL_S:g} s more: {'met' if median(extra) <= GOAL_S else 'not met'}")
    for name, runs in parts.items():
        print(f"\n{name}, seconds after submit")
        for part, at in medians(runs).items():
            print(f"  {at:8.3f}  {part}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
