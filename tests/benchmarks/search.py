"""How much of what a search reserves is spent in training steps, against the pattern that Ray documents for Tune with
Ray Train V2 on the same cluster; and how long an early stop holds the workers of its trial.

Both try the same learning rates with the same model, images and number of steps, as many side by side. What is reserved
is those workers, from the start of the job to its end; in steps is the time from the start of a trial's first step to
the end of its last. Held is the time from the verdict until Ray has placed another group on the same workers: one that
was waiting, and one that is asked for then, as a search does (`tests/workers/release_driver.py`).
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from sqlalchemy import select

from orchestrator.client import Client
from orchestrator.embedded.stack import Stack
from orchestrator.storage.db import Database
from orchestrator.storage.tables import MetricRow
from tests.benchmarks.harness import Row, arguments, interleave, progress, report
from tests.stack.jobs import finished, pretraining, until
from tests.stack.running import DATA, ray_client, running_stack

OURS, TUNE = "Patchwork", "Tune + Train V2"
SIDE_BY_SIDE = 2
GOAL, HELD_GOAL_S = 0.85, 0.5
DEADLINE_S = 3000.0
IDLE_S = 2.0


def spec(trials: int, steps: int) -> dict[str, Any]:
    """A grid of so many learning rates; nothing but training, and one evaluation at its end."""
    base = pretraining(
        schedule={"total_steps": steps, "warmup_steps": 0},
        resources={"workers": 1, "gpus_per_worker": 0},
        train__log_every_steps=50,
        data__subset=None,
        data__augment={"crop": "resize"},
        data__holdout={"fraction": 0.02},
        model__dropout=0.0,
        model__gelu="exact",
        zero={"stage": 0},
        checkpoint={},
    )
    rates = [1e-4 * 2**n for n in range(trials)]
    return {
        "kind": "search",
        "name": "share",
        "base": base,
        "space": {"optim.lr": {"type": "grid", "values": rates}},
        "algorithm": "grid",
        "budget": {"trials": trials},
        "concurrency": SIDE_BY_SIDE,
    }


class Searches:
    """Both contenders on one stack. Each call is one search; returned is the share of what it reserved."""

    def __init__(self, stack: Stack, client: Client, folder: Path, asked: dict[str, Any]) -> None:
        self._client, self._folder, self._asked = client, folder, asked
        self._database = Database(f"sqlite:///{stack.dir.database}")
        self._ray = ray_client(stack)
        self.runs: dict[str, list[dict[str, Any]]] = {OURS: [], TUNE: []}

    def ours(self) -> float:
        search = self._client.jobs.create(self._asked)
        job = finished(self._client, search.id, DEADLINE_S)
        assert job.started_at is not None
        assert job.ended_at is not None
        took_s = (job.ended_at - job.started_at).total_seconds()
        return self._end(OURS, took_s, [self._in_steps_s(t.job_id) for t in self._client.searches.trials(search.id)])

    def _in_steps_s(self, job_id: str) -> float:
        """From the first step's start to the last one's end: what lies between their ends, and one more step."""
        with self._database.session() as session:
            query = select(MetricRow.step, MetricRow.at).where(
                MetricRow.job_id == job_id, MetricRow.name == "train/loss"
            )
            rows = session.execute(query.order_by(MetricRow.step)).all()
        (first, began), (last, ended) = rows[0], rows[-1]
        return float((ended - began).total_seconds() * last / (last - first))

    def tune(self) -> float:
        folder = self._folder / uuid.uuid4().hex
        folder.mkdir()
        (folder / "spec.json").write_text(json.dumps(self._asked))
        words = ["python", "-m", "tests.benchmarks.search_script", folder / "spec.json", folder, self._folder / DATA]
        ended = self._submit(" ".join(map(str, words)))
        took_s = (ended["end_time"] - ended["start_time"]) / 1000.0
        found = [json.loads(file.read_text()) for file in folder.glob("*.json") if file.name != "spec.json"]
        assert len(found) == self._asked["budget"]["trials"], f"{len(found)} trials came to their end"
        return self._end(TUNE, took_s, found)

    def held(self) -> dict[str, list[float]]:
        """Seconds that a stopped trial's workers were held, several times, and of which parts they are."""
        out = self._folder / "held.json"
        self._submit(f"python -m tests.workers.release_driver {out}")
        found: dict[str, list[float]] = json.loads(out.read_text())
        return found

    def _submit(self, entrypoint: str) -> dict[str, Any]:
        """Runs a Ray job to its end: what Ray says of it."""
        answer = self._ray.post("/api/jobs/", json={"entrypoint": entrypoint}).raise_for_status()
        path = f"/api/jobs/{answer.json()['submission_id']}"

        def ended() -> dict[str, Any] | None:
            state: dict[str, Any] = self._ray.get(path).raise_for_status().json()
            if state["status"] in ("FAILED", "STOPPED"):
                raise RuntimeError(f"{state['status']}: {self._ray.get(path + '/logs').text[-4000:]}")
            return state if state["status"] == "SUCCEEDED" else None

        return until(f"the end of {entrypoint}", ended, DEADLINE_S)

    def _end(self, name: str, took_s: float, in_steps_s: list[float]) -> float:
        share = sum(in_steps_s) / (SIDE_BY_SIDE * took_s)
        self.runs[name].append({"took_s": took_s, "in_steps_s": in_steps_s, "share": share})
        trials = ", ".join(f"{seconds:.1f}" for seconds in in_steps_s)
        progress(f"{name}: {took_s:.1f} s for trials of {trials} s in steps")
        time.sleep(IDLE_S)  # what has ended leaves the machine
        return share

    def close(self) -> None:
        self._ray.close()
        self._database.close()


def main(argv: list[str]) -> int:
    parser = arguments(__doc__ or "", repetitions=1)
    parser.add_argument("--trials", type=int, default=4, help="default 4, two side by side")
    parser.add_argument("--steps", type=int, default=4000, help="of each trial; default 4000, about 60 s")
    parser.add_argument("--only", choices=["share", "held"], help="one of the two parts")
    given = parser.parse_args(argv)
    rows: list[Row] = []
    with running_stack(num_cpus=4) as (stack, folder), Client(stack.url, stack.token) as client:
        searches = Searches(stack, client, folder, spec(given.trials, given.steps))
        try:
            if given.only != "share":
                held = [searches.held() for _ in range(given.repetitions)]
                for part in held[0]:
                    rows.append(Row(f"early stop: {part}", "s", [s for found in held for s in found[part]]))
            if given.only != "held":
                values = interleave({OURS: searches.ours, TUNE: searches.tune}, given.repetitions)
                rows += [Row(OURS, "share in steps", values[OURS], TUNE), Row(TUNE, "share in steps", values[TUNE])]
        finally:
            searches.close()
    report("search", "What a search reserves and uses", rows, given.out, {"runs": searches.runs})
    for row in rows:
        if row.name == OURS:
            print(f"\ngoal, a share of at least {GOAL:g}: {'met' if row.median >= GOAL else 'not met'}")
        elif row.unit == "s" and "placed" in row.name:
            print(f"\ngoal, {row.name} < {HELD_GOAL_S:g} s: {'met' if row.median < HELD_GOAL_S else 'not met'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
