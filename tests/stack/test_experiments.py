"""Experiments on the real stack: each finished run is kept, and only what is missing or changed is run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.client import Client
from tests.experiments.experiment import ExperimentError, Results, Run, run_all
from tests.experiments.specs import pretraining, transformer

pytestmark = pytest.mark.stack


def small(key: str, lr: float) -> Run:
    spec = pretraining("experiment", transformer(14, 16, 1, 2, 16), steps=5, lr=lr, seed=0, fraction=0.01)
    return Run(key, {"lr": lr}, spec)


def test_an_interrupted_experiment_goes_on(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    first, second = small("first", 1e-3), small("second", 2e-3)
    runs = [first, second]

    run_all(client, [first], Results.read(path, runs), parallel=2)
    kept = Results.read(path, runs).records
    assert list(kept) == ["first"]
    record = kept["first"]
    assert (record.steps, record.images) == (5, 5 * 64)
    assert record.exaflops == pytest.approx(6 * record.macs * record.images / 1e18)
    assert 0.0 < record.last("eval/top1") < 1.0

    run_all(client, runs, results := Results.read(path, runs), parallel=2)
    assert results.of(runs) == list(Results.read(path, runs).records.values())
    assert results.records["first"] == record, "it was not run again"

    # What is described otherwise today is not done.
    changed = [first, replace(second, spec=small("second", 3e-3).spec)]
    assert list(Results.read(path, changed).records) == ["first"]


def test_a_run_starts_from_another_ones_checkpoint(client: Client, tmp_path: Path) -> None:
    first = small("first", 1e-3)
    tuned = {key: value for key, value in first.spec.items() if key != "model"}
    tuned |= {"kind": "finetune", "model": {"image_size": 28, "in_channels": 1}}
    runs = [Run("tuned", {}, tuned, after="first"), first]
    results = Results(tmp_path / "small.json")
    run_all(client, runs, results, parallel=1)
    source = client.checkpoints.find(f"{results.records['first'].job_id}/latest")
    assert client.jobs.get(results.records["tuned"].job_id).init_from == source.id


def test_a_job_that_fails_is_named_with_its_reason(client: Client, tmp_path: Path) -> None:
    broken = small("broken", 1e-3)
    spec = {**broken.spec, "data": broken.spec["data"] | {"std": [1e-42]}}  # infinite pixels
    with pytest.raises(ExperimentError, match=r"broken \(job_.*\): FAILED NAN_LOSS"):
        run_all(client, [replace(broken, spec=spec)], Results(tmp_path / "broken.json"), parallel=1)
