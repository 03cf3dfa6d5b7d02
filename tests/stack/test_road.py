"""The whole road on real parts: pre-train, fine-tune, evaluate, export, inspect, fetch, load, classify."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vit
from orchestrator.client import Client
from orchestrator.fetch import fetch
from tests.stack.jobs import finished, pretraining, series
from vit.classify import predict

pytestmark = pytest.mark.stack


def test_from_images_to_a_model_in_the_users_hands(client: Client, tmp_path: Path) -> None:
    pretrain = client.jobs.create(pretraining(schedule__total_steps=150, data__augment={"crop": "resize"}))
    finetune = client.jobs.create(
        pretraining(
            kind="finetune",
            init_from=f"{pretrain.id}/best",
            queue={"depends_on": [pretrain.id]},
            model={"image_size": 42, "in_channels": 1},
            data__augment={"crop": "resize"},
            schedule__total_steps=60,
        )
    )
    assert client.jobs.get(finetune.id).state == "QUEUED"
    pretrain, finetune = finished(client, pretrain.id), finished(client, finetune.id)
    assert pretrain.last_metrics["eval/top1"] is not None
    assert pretrain.last_metrics["eval/top1"] > 0.5
    # A zero head gives ten equal logits: the first loss is that of a guess.
    assert series(client, finetune.id, "train/loss")[1] == pytest.approx(np.log(10), abs=1e-4)
    assert finetune.spec["model"]["embed_dim"] == 32

    evaluations = [
        client.jobs.create(
            {
                "kind": "evaluate",
                "init_from": f"{finetune.id}/latest",
                "resources": {"workers": workers, "gpus_per_worker": 0},
            }
        )
        for workers in (1, 2)
    ]
    export = client.jobs.create(
        {"kind": "export", "init_from": f"{finetune.id}/latest", "resources": {"gpus_per_worker": 0}, "format": "timm"}
    )
    inspection = client.jobs.create(
        {
            "kind": "inspect",
            "init_from": f"{finetune.id}/latest",
            "num_images": 16,
            "num_rollout_images": 2,
            "resources": {"gpus_per_worker": 0},
        }
    )
    reports = []
    for evaluation in evaluations:
        finished(client, evaluation.id)
        reports.append(client.jobs.report(evaluation.id))
    assert reports[0].num_examples == 10_000
    assert reports[0].metrics["eval/top1"] == reports[1].metrics["eval/top1"]
    assert reports[0].metrics["eval/top1"] == finetune.last_metrics["eval/top1"]

    finished(client, export.id)
    (exported,) = client.jobs.exports(export.id).items
    assert {file.name for file in exported.files} >= {"model.safetensors", "config.json"}

    finished(client, inspection.id)
    pictures = {picture.name: picture for picture in client.jobs.pictures(inspection.id).items}
    assert list(pictures) == ["patch_filters", "position_similarity", "attention_distance", "attention_rollout"]
    for picture in pictures.values():
        image = io.BytesIO()
        assert client.jobs.write_picture(inspection.id, picture.image.name, image) == picture.image.num_bytes
        assert Image.open(image).format == "PNG"
    numbers = io.BytesIO()
    client.jobs.write_picture(inspection.id, pictures["attention_distance"].numbers.name, numbers)
    numbers.seek(0)
    distances = np.load(numbers, allow_pickle=False)["distance"]
    assert distances.shape == (2, 2)
    assert ((distances > 0) & (distances < 42)).all()
    assert [e.data["name"] for e in client.jobs.events(inspection.id) if e.type == "picture.drawn"] == list(pictures)

    fetched = fetch(client, f"{finetune.id}/best", tmp_path / "model")
    model = vit.load(fetched.folder)
    assert model.config.image_size == (42, 42)
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    assert predict(model, images).sum(dim=1) == pytest.approx([1.0, 1.0], abs=1e-5)
