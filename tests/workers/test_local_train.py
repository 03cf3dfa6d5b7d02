"""`patchwork train`: the same numbers as on a cluster, Ctrl-C and on again, weights in and out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import vit
from tests.fakes.dir_store import DirStore
from tests.ranks import run_ranks
from tests.workers.attempts import TINY, make_attempt, saved_at, tiny_spec
from tests.workers.image_sets import write_folder
from tests.workers.rank_jobs import Run, run_attempts
from workers.checkpoint import read_weights

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]


def patchwork_train(folder: Path, spec: dict[str, Any], *options: str) -> subprocess.Popen[str]:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "orchestrator.cli.main", "train", str(path), "-o", str(folder / "out"), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_to_end(folder: Path, spec: dict[str, Any], *options: str) -> tuple[int, str]:
    process = patchwork_train(folder, spec, *options)
    text, _ = process.communicate(timeout=280)
    return process.returncode, text


def spec_of(**parts: Any) -> dict[str, Any]:
    """TINY, as a user writes it: resources are this machine's whatever the file says."""
    raw = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for part, value in parts.items():
        raw[part] = raw.get(part, {}) | value if isinstance(value, dict) else value
    return raw | {"resources": {"workers": 4, "cpus_per_worker": 1}}


def test_it_learns_what_a_cluster_learns_and_its_weights_load(tmp_path: Path) -> None:
    code, text = run_to_end(tmp_path, spec_of(eval={"at_end": True}), "--set", "train.ema_decay=0.5")
    assert code == 0, text
    assert "Done: 6 steps, top-1" in text
    attempt = make_attempt(tiny_spec(train={"ema_decay": 0.5}), 1)
    result = run_ranks(1, run_attempts, [Run(attempt)], str(tmp_path / "reference"))[0][0]
    points = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [p["value"] for p in points if p["name"] == "train/loss"] == result.losses
    averaged, _ = read_weights(DirStore(tmp_path / "reference"), saved_at(6).prefix, "ema")
    model = vit.load(tmp_path / "out" / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, averaged[name]), name


def test_interrupted_it_saves_and_goes_on_exactly(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    spec = spec_of(schedule={"total_steps": 400, "warmup_steps": 1}, checkpoint={"every_steps": 100, "keep_last": 1})
    code, text = run_to_end(tmp_path / "whole", spec)
    assert code == 0, text

    process = patchwork_train(tmp_path / "cut", spec)
    metrics, deadline = tmp_path / "cut" / "out" / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.stat().st_size == 0:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 130, text
    assert "The same command goes on from there." in text
    saved = list((tmp_path / "cut" / "out" / "store").glob("jobs/*/checkpoints/*"))
    assert len(saved) == 1, "older ones go"

    code, text = run_to_end(tmp_path / "cut", spec)
    assert code == 0, text
    assert "continues from step" in text
    left, right = (vit.load(tmp_path / name / "out" / "model").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(left[name], right[name]) for name in left)

    other = spec_of(schedule={"total_steps": 401})
    code, text = run_to_end(tmp_path / "cut", other)
    assert code == 2
    assert "holds a run of another model, data, optimizer or schedule" in text
    code, text = run_to_end(tmp_path / "cut", spec_of(), "--fresh")
    assert code == 0, text


def test_a_finetune_starts_from_a_file(tmp_path: Path) -> None:
    code, text = run_to_end(tmp_path, spec_of())
    assert code == 0, text
    second = tmp_path / "second"
    second.mkdir()
    finetune = {
        "kind": "finetune",
        "model": {"image_size": 12},
        "data": {"source": {"type": "synthetic", "num_train": 64, "num_eval": 16, "num_classes": 9, "image_size": 12}},
        "optim": {"name": "sgd", "lr": 0.05},
        "schedule": {"total_steps": 3},
        "train": {"global_batch_size": 16, "precision": "fp32"},
    }
    code, text = run_to_end(second, finetune)
    assert code == 2
    assert "--init PATH" in text
    code, text = run_to_end(second, finetune, "--init", str(tmp_path / "out" / "model"))
    assert code == 0, text
    config = vit.load(second / "out" / "model").config
    assert (config.image_size, config.num_classes, config.embed_dim) == ((12, 12), 9, 24)


def test_what_cannot_be_run_here_is_refused(tmp_path: Path) -> None:
    code, text = run_to_end(tmp_path, {"kind": "evaluate", "init_from": "ckpt_1"})
    assert code == 2
    assert "/kind: this command trains" in text
    folder = spec_of(data={"source": {"type": "folder", "name": "photos"}})
    code, text = run_to_end(tmp_path, folder, "--data-root", str(tmp_path))
    assert code == 2
    assert "/data/source/name" in text


def test_masked_patches_and_probes_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "data" / "pets", {"train": 4, "test": 3})
    probes = {"shots": [2], "num_seeds": 1, "datasets": [{"source": {"type": "folder", "name": "pets"}}]}
    spec = spec_of(train={"objective": "masked_patch"}, eval={"at_end": True, "few_shot": probes})
    code, text = run_to_end(tmp_path, spec, "--data-root", str(tmp_path / "data"))
    assert code == 0, text
    points = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {p["name"] for p in points} >= {"train/top1", "eval/loss", "eval/few_shot/pets/2"}
    assert "mask_token" in vit.load(tmp_path / "out" / "model").state_dict()
