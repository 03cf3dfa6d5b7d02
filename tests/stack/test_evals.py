"""Evaluations on real parts: masked patch prediction, then VTAB-1k on two data sets, ReaL labels, few-shot."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.cli.main import run
from orchestrator.client import ApiError, Client
from orchestrator.embedded.stack import Stack
from orchestrator.vtab_schemas import VtabReport
from tests.stack.jobs import fashion_mnist_folder, finished, pretraining, series
from tests.workers.image_sets import write_image

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1200)]
SIDE = 28
PATIENCE_S = 400.0
"""Jobs of two data sets run side by side here: longer than other tests wait."""


@pytest.fixture(scope="module")
def shapes(data_root: Path, client: Client) -> str:
    """A registered folder of PNGs: bars that lie, stand or cross, 400 and 40 of each."""
    rng = np.random.default_rng(5)
    for split, count in (("train", 400), ("test", 40)):
        for name in ("cross", "lying", "standing"):
            for number in range(count):
                image = rng.integers(0, 60, (SIDE, SIDE), dtype=np.uint8)
                row, column = rng.integers(4, SIDE - 6, 2)
                if name != "standing":
                    image[row : row + 3] = 220
                if name != "lying":
                    image[:, column : column + 3] = 220
                write_image(data_root / "shapes" / split / name / f"{number:03d}.png", image)
    return client.add_dataset("shapes", "shapes").name


@pytest.fixture(scope="module")
def pretrained(client: Client) -> str:
    """A checkpoint of masked patch prediction."""
    spec = pretraining(
        name="masked",
        model__dropout=0.0,
        model__pool="gap",
        data__augment={"crop": "resize"},
        schedule__total_steps=200,
        train__objective="masked_patch",
    )
    job = finished(client, client.jobs.create(spec).id, PATIENCE_S)
    losses = series(client, job.id, "train/loss")
    assert losses[1] == pytest.approx(np.log(8), abs=1e-4), "eight grey levels, equally likely to a zero head"
    assert losses[200] is not None
    assert losses[200] < 0.8 * np.log(8)
    assert job.last_metrics["eval/top1"] is not None
    assert job.last_metrics["eval/top1"] > 0.4
    return client.checkpoints.find(f"{job.id}/latest").id


def test_what_needs_a_classifier_is_refused(client: Client, pretrained: str) -> None:
    for kind, fields in (("evaluate", {}), ("export", {"format": "timm"})):
        with pytest.raises(ApiError, match="has no classifier; fine-tune it first"):
            client.jobs.create({"kind": kind, "init_from": pretrained, "resources": {"gpus_per_worker": 0}, **fields})


def test_vtab_on_two_data_sets(
    stack: Stack, client: Client, pretrained: str, shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "suite.yaml"
    tasks = [
        {"name": "fashion", "group": "natural", "source": {"type": "torchvision", "name": "FashionMNIST"}},
        {"name": "shapes", "group": "structured", "source": {"type": "folder", "name": shapes}},
    ]
    file.write_text(json.dumps({"name": "two", "tasks": tasks, "steps": 40}))
    settings = {"model.image_size": SIDE, "model.in_channels": 1, "resources.gpus_per_worker": 0, "optim.lr": 0.1}
    settings |= {"train.global_batch_size": 100, "train.precision": "fp32", "resources.workers": 2}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    server = ["--url", stack.url, "--token", stack.token]
    assert run(["vtab", "run", str(file), "--from", pretrained, *overrides, "--follow", "--json", *server]) == 0
    report = VtabReport.model_validate_json(capsys.readouterr().out)
    assert [(result.task, result.state, result.step) for result in report.results] == [
        ("fashion", "SUCCEEDED", 40),
        ("shapes", "SUCCEEDED", 40),
    ]
    for result in report.results:
        job = client.jobs.get(result.job_id)
        assert job.plan["num_examples"] == 1000
        assert job.last_metrics["eval/top1"] == result.top1
    fashion, bars = (result.top1 for result in report.results)
    assert fashion is not None
    assert bars is not None
    assert fashion > 0.3
    assert bars > 0.4
    assert report.top1 == pytest.approx((fashion + bars) / 2)
    assert [(group.name, group.top1) for group in report.groups] == [("natural", fashion), ("structured", bars)]


def test_real_labels_and_few_shot_of_a_folder(client: Client, data_root: Path, pretrained: str, shapes: str) -> None:
    tuned = client.jobs.create(
        pretraining(
            kind="finetune",
            init_from=pretrained,
            model={"image_size": SIDE, "in_channels": 1},
            data__augment={"crop": "resize"},
        )
    )
    finished(client, tuned.id, PATIENCE_S)
    with gzip.open(fashion_mnist_folder() / "t10k-labels-idx1-ubyte.gz") as labels:
        truth = np.frombuffer(labels.read(), dtype=np.uint8, offset=8)
    # A file that says what the labels say of half of the images, and nothing of the others.
    listed: list[list[int]] = [[int(label)] if index % 2 else [] for index, label in enumerate(truth)]
    (data_root / "reassessed.json").write_text(json.dumps(listed))
    asked: dict[str, Any] = {
        "kind": "evaluate",
        "init_from": f"{tuned.id}/latest",
        "resources": {"workers": 2, "gpus_per_worker": 0},
        "real_labels": "reassessed.json",
        "few_shot": {"shots": [5], "num_seeds": 2, "datasets": [{"source": {"type": "folder", "name": shapes}}]},
    }
    job = finished(client, client.jobs.create(asked).id, PATIENCE_S)
    metrics = client.jobs.report(job.id).metrics
    assert metrics["eval/real_num_examples"] == 5000
    assert metrics["eval/real_top1"] == pytest.approx(metrics["eval/top1"], abs=0.02)
    assert metrics["eval/few_shot/shapes/5"] > 0.34
    assert "eval/few_shot/5" not in metrics

    (data_root / "reassessed.json").write_text("[[12]]")
    failed = client.jobs.wait(client.jobs.create(asked).id, PATIENCE_S)
    assert (failed.state, failed.reason) == ("FAILED", "DATA_ERROR")
    assert "entry 0 names class '12', expected 0 to 9" in failed.message
