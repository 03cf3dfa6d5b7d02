"""What each algorithm of a search finds, and at what cost; the full grid is what the others are measured against.

One small model on Fashion-MNIST, three settings varied: learning rate, weight decay and drop-path. Judged on a tenth of
the training images that is held out; the test images are not looked at. A search that has finished is kept in
OUT/search_algorithms.json, and the same command goes on with those that have not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.client import Client
from tests.benchmarks.harness import machine, progress
from tests.experiments.experiment import ExperimentError, with_stack
from tests.experiments.specs import pretraining, transformer
from tests.experiments.summary import markdown

STEPS, EVERY = 240, 40
DEADLINE_S = 7200.0
GRID: dict[str, Any] = {
    "optim.lr": {"type": "choice", "values": [3e-4, 1e-3, 3e-3, 1e-2]},
    "optim.weight_decay": {"type": "choice", "values": [0.0, 0.1]},
    "model.drop_path": {"type": "choice", "values": [0.0, 0.1]},
}
RANGES: dict[str, Any] = {
    "optim.lr": {"type": "log_uniform", "low": 3e-4, "high": 1e-2},
    "optim.weight_decay": {"type": "uniform", "low": 0.0, "high": 0.1},
    "model.drop_path": {"type": "uniform", "low": 0.0, "high": 0.1},
}
ASHA = {"name": "asha", "grace_steps": EVERY, "reduction": 3}
PBT = {"name": "pbt", "interval_steps": EVERY, "quantile": 0.25}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grid": {"algorithm": "grid", "space": GRID, "budget": {"trials": 16}},
    "random": {"algorithm": "random", "space": RANGES, "budget": {"trials": 8}},
    "TPE": {"algorithm": "tpe", "space": RANGES, "budget": {"trials": 8}},
    "ASHA on the grid": {"algorithm": "grid", "space": GRID, "budget": {"trials": 16}, "scheduler": ASHA},
    "PBT": {
        "algorithm": "random",
        # What may change while a model trains.
        "space": {key: p for key, p in RANGES.items() if key.startswith("optim.")},
        "budget": {"trials": 4},
        "scheduler": PBT,
    },
}


@dataclass(frozen=True)
class Found:
    """What a search found."""

    name: str
    asked: dict[str, Any]
    job_id: str
    trials: int
    stopped: int
    """Before their end."""
    steps: int
    """Of all trials."""
    worker_s: float
    """Held by the trials."""
    best: float
    params: dict[str, Any]


def spec(name: str, parallel: int) -> dict[str, Any]:
    """The search of an algorithm; everything but what the algorithm says is the same for all."""
    base = pretraining("trial", transformer(7, 32, 2, 2, 64), steps=STEPS, lr=1e-3, seed=0, fraction=0.5)
    base["data"] |= {"holdout": {"fraction": 0.1, "seed": 0}}
    base["eval"] |= {"every_steps": EVERY}
    base["checkpoint"] = {"every_steps": EVERY, "keep_last": 10}
    return {"kind": "search", "name": name, "base": base, "concurrency": parallel, "seed": 1, **ALGORITHMS[name]}


def read(path: Path, parallel: int) -> dict[str, Found]:
    """What `path` holds; a search that is described otherwise today counts as not done.

    Raises:
        ExperimentError: it is no such file.
    """
    if not path.exists():
        return {}
    try:
        found = [Found(**one) for one in json.loads(path.read_text())["searches"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{path} is not a file of results: {error}") from error
    return {f.name: f for f in found if f.name in ALGORITHMS and f.asked == spec(f.name, parallel)}


def write(path: Path, found: Mapping[str, Found]) -> None:
    """Replaces the file whole."""
    searches = [asdict(found[name]) for name in ALGORITHMS if name in found]
    document = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "searches": searches}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(beside, path)


def run(client: Client, name: str, parallel: int) -> Found:
    """Runs a search to its end.

    Raises:
        ExperimentError: it failed.
    """
    asked = spec(name, parallel)
    began = time.monotonic()
    job = client.jobs.wait(client.jobs.create(asked).id, DEADLINE_S)
    if job.state != "SUCCEEDED":
        raise ExperimentError(f"{name} ({job.id}): {job.state} {job.reason}: {job.message}")
    trials = client.searches.trials(job.id)
    best = client.searches.best(job.id)
    assert best.value is not None, "a search that succeeded has a best trial"
    progress(f"{name}: {100 * best.value:.2f} % with {best.params}, {time.monotonic() - began:.0f} s")
    return Found(
        name=name,
        asked=asked,
        job_id=job.id,
        trials=len(trials),
        stopped=sum(t.reason == "STOPPED_EARLY" for t in trials),
        steps=sum(t.step for t in trials),
        worker_s=sum(t.gpu_seconds for t in trials),
        best=best.value,
        params=best.params,
    )


def table(found: Mapping[str, Found]) -> str:
    """A row for each search that is there."""
    rows = []
    for name, one in found.items():
        params = ", ".join(f"{key.rpartition('.')[2]} {value:.3g}" for key, value in sorted(one.params.items()))
        rows.append(
            [name, one.trials, one.stopped, f"{one.steps:,}", f"{one.worker_s:,.0f}", f"{100 * one.best:.2f}", params]
        )
    return markdown(["", "trials", "of these stopped", "steps", "worker-seconds", "best top-1 (%)", "with"], rows)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What each algorithm of a search finds, and at what cost")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder of results (default bench-out)")
    parser.add_argument("--parallel", type=int, default=2, help="trials side by side (default 2)")
    parser.add_argument("--only", choices=ALGORITHMS, action="append", help="this algorithm; more than once: these")
    parser.add_argument("--report", action="store_true", help="run nothing; the table of what there is")
    given = parser.parse_args(words)
    path = given.out / "search_algorithms.json"
    try:
        found = read(path, given.parallel)
        missing = [name for name in given.only or ALGORITHMS if name not in found]

        def work(client: Client) -> None:
            for name in missing:
                found[name] = run(client, name, given.parallel)
                write(path, found)

        if missing and not given.report:
            with_stack(given.parallel, work)
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what has finished is kept, and the same command goes on.", file=sys.stderr)
        return 130
    print("\n" + table({name: found[name] for name in ALGORITHMS if name in found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
