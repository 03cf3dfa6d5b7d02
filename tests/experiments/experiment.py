"""What an experiment is: jobs, the records of those that have finished, and what is made of them.

<out>/<name>.json   a record per finished job; an interrupted experiment goes on from it
<out>/<name>.md     the table
<out>/<name>*.png   the plots
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.client import Client
from orchestrator.embedded.data_dir import DataDir
from orchestrator.embedded.stack import Stack
from orchestrator.schemas import JobPublic
from tests.benchmarks.harness import machine, progress
from tests.stack.jobs import fashion_mnist_folder

OUT = Path("experiments-out")
LOOK_AGAIN_S = 0.5


@dataclass(frozen=True)
class Run:
    """A job of an experiment."""

    key: str
    labels: Mapping[str, Any]
    """What it is, for tables and plots: a value for each thing that is varied."""
    spec: Mapping[str, Any]
    after: str | None = None
    """The key of the run whose last checkpoint it starts from."""

    @property
    def fingerprint(self) -> str:
        """Of everything that its result depends on."""
        text = json.dumps([self.spec, self.after], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """What a finished run gave."""

    key: str
    labels: dict[str, Any]
    fingerprint: str
    job_id: str
    steps: int
    images: int
    """Seen in training, repetitions counted."""
    parameters: int
    macs: int
    """Multiply-accumulates of one image's forward pass."""
    exaflops: float
    seconds: float
    """From the job's start to its end."""
    metrics: dict[str, dict[str, float]]
    """Each `eval/` metric, value by step."""

    def last(self, metric: str) -> float:
        """The value of a metric at the end of training."""
        return self.metrics[metric][str(self.steps)]


@dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    runs: Sequence[Run]
    table: Callable[[Sequence[Record]], str]
    """The Markdown table of all records."""
    plot: Callable[[Sequence[Record], Path], None]
    """Draws what there is to see into a folder."""


class ExperimentError(Exception):
    """A job did not succeed, or a file is not what it should be."""


@dataclass
class Results:
    """The records of an experiment, in a file that is replaced whole after each finished run."""

    path: Path
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, runs: Sequence[Run]) -> Results:
        """What `path` holds of these runs; a run that is described otherwise today counts as not done.

        Raises:
            ExperimentError: it is no such file.
        """
        if not path.exists():
            return cls(path)
        try:
            found = [Record(**record) for record in json.loads(path.read_text())["runs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ExperimentError(f"{path} is not a file of results: {error}") from error
        wanted = {run.key: run.fingerprint for run in runs}
        return cls(path, {r.key: r for r in found if wanted.get(r.key) == r.fingerprint})

    def of(self, runs: Sequence[Run]) -> list[Record]:
        """The records of the runs that have one, in the runs' order."""
        return [self.records[run.key] for run in runs if run.key in self.records]

    def add(self, record: Record) -> None:
        """Keep a record, on disk too."""
        self.records[record.key] = record
        runs = [asdict(self.records[key]) for key in sorted(self.records)]
        document = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "runs": runs}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(beside, self.path)


def run_all(client: Client, runs: Sequence[Run], results: Results, parallel: int) -> None:
    """Submit the runs that have no record yet and record them; one more than `parallel` is in the service's hands, so
    that a core that becomes free has a job at once.

    Raises:
        ExperimentError: jobs failed; those that were under way were waited for first.
    """
    waiting = [run for run in runs if run.key not in results.records]
    under_way: dict[str, Run] = {}
    failed: list[str] = []
    while under_way or (waiting and not failed):
        while not failed and len(under_way) <= parallel and (run := _next(waiting, results)) is not None:
            waiting.remove(run)
            under_way[_submit(client, run, results)] = run
        if waiting and not under_way and not failed:
            raise ExperimentError(f"{waiting[0].key} starts from {waiting[0].after}, which is no run before it")
        for job_id, run in list(under_way.items()):
            job = client.jobs.get(job_id)
            if not job.is_terminal:
                continue
            del under_way[job_id]
            if job.state == "SUCCEEDED":
                record = record_of(client, run, job)
                results.add(record)
                done, accuracy = len(results.records), job.last_metrics.get("eval/top1")
                progress(f"{done}/{len(runs)}  {run.key}: top-1 {accuracy}, {record.seconds:.0f} s")
            else:
                failed.append(f"{run.key} ({job.id}): {job.state} {job.reason}: {job.message}")
        time.sleep(LOOK_AGAIN_S)
    if failed:
        raise ExperimentError("\n".join(failed))


def _next(waiting: Sequence[Run], results: Results) -> Run | None:
    """The first run that could start now."""
    return next((run for run in waiting if run.after is None or run.after in results.records), None)


def _submit(client: Client, run: Run, results: Results) -> str:
    spec = dict(run.spec)
    if run.after is not None:
        spec["init_from"] = f"{results.records[run.after].job_id}/latest"
    return client.jobs.create(spec).id


def record_of(client: Client, run: Run, job: JobPublic) -> Record:
    """The record of a run whose job has succeeded."""
    metrics = client.jobs.metrics(job.id, max_points=2000)
    series = {
        found.name: {str(s): v for s, v in zip(found.steps, found.values, strict=True) if v is not None}
        for found in metrics.series
        if found.name.startswith("eval/")
    }
    assert job.started_at is not None
    assert job.ended_at is not None
    return Record(
        key=run.key,
        labels=dict(run.labels),
        fingerprint=run.fingerprint,
        job_id=job.id,
        steps=job.progress.step,
        images=job.progress.step * job.plan["global_batch_size"],
        parameters=job.plan["parameters"],
        macs=job.plan["macs"],
        exaflops=job.plan["exaflops"],
        seconds=(job.ended_at - job.started_at).total_seconds(),
        metrics=series,
    )


def report_text(experiment: Experiment, records: Sequence[Record]) -> str:
    """The table, after how many of the runs it is of."""
    return f"{len(records)} of {len(experiment.runs)} jobs.\n\n{experiment.table(records)}"


def write_report(experiment: Experiment, records: Sequence[Record], out: Path) -> None:
    """The table and the plots, into `out`; the table is printed too."""
    out.mkdir(parents=True, exist_ok=True)
    text = report_text(experiment, records)
    (out / f"{experiment.name}.md").write_text(text)
    experiment.plot(records, out)
    print(f"\n{experiment.title}\n\n{text}", flush=True)


def main(experiment: Experiment, words: Sequence[str] | None = None) -> int:
    """The program of an experiment."""
    parser = argparse.ArgumentParser(description=experiment.title)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of results (default {OUT}); runs in it are kept")
    parser.add_argument("--parallel", type=int, default=2, help="jobs at once, each on one core (default 2)")
    parser.add_argument("--only", default="", help="only runs whose key contains this; no report is written")
    parser.add_argument("--report", action="store_true", help="run nothing; table and plots of what there is")
    arguments = parser.parse_args(words)
    if arguments.parallel < 1:
        parser.error(f"--parallel {arguments.parallel}: expected at least 1")
    runs = [run for run in experiment.runs if arguments.only in run.key]
    if not runs:
        parser.error(f"--only {arguments.only!r}: no run's key contains it")
    try:
        results = Results.read(arguments.out / f"{experiment.name}.json", experiment.runs)
        if not arguments.report and any(run.key not in results.records for run in runs):
            with_stack(arguments.parallel, lambda client: run_all(client, runs, results, arguments.parallel))
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what has finished is kept, and the same command goes on.", file=sys.stderr)
        return 130
    if not arguments.only:
        write_report(experiment, results.of(experiment.runs), arguments.out)
    return 0


def with_stack(num_cpus: int, work: Callable[[Client], None]) -> None:
    """Call `work` with a client of an embedded stack, which keeps its checkpoints for the next time."""
    folder = OUT / "data"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "fashion-mnist"
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(fashion_mnist_folder())
    stack = Stack(DataDir(OUT / "stack"), port=0, num_cpus=num_cpus, data_root=folder)
    stop = threading.Event()
    watcher = threading.Thread(target=stack.watch, args=(progress, stop))
    try:
        stack.start()
        watcher.start()
        with Client(stack.url, stack.token) as client:
            for left in client.jobs.list(state=["QUEUED", "PREPARING", "RUNNING", "RECOVERING"]):
                client.jobs.cancel(left.id)
            work(client)
    finally:
        stop.set()
        if watcher.is_alive():
            watcher.join()
        stack.stop()
