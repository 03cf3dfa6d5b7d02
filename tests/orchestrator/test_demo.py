"""The demo's judgement, and its parts that need torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vit
from configs.model import VitConfig
from configs.wire import ModelFile, Preprocess
from orchestrator.cli.demo import shortfalls
from workers import demo
from workers.data.torchvision_sets import DEBIAN_FASHION_MNIST


def test_the_demo_is_content_only_with_what_it_promises() -> None:
    good = {"pretrain": 0.88, "finetune": 0.885, "baseline": 0.84, "fetched": 0.885}
    assert shortfalls(**good) == []
    assert "below 86.00 %" in shortfalls(**good | {"pretrain": 0.859, "baseline": 0.80})[0]
    assert "leads the softmax baseline by less than 2 points" in shortfalls(**good | {"baseline": 0.861})[0]
    assert "finetune top-1 87.90 % is below" in shortfalls(**good | {"finetune": 0.879, "fetched": 0.879})[0]
    assert "the fetched model's top-1 is 88.40 %" in shortfalls(**good | {"fetched": 0.884})[0]


def test_the_baseline_learns_what_a_line_can_separate() -> None:
    images = torch.zeros(2000, 1, 4, 4, dtype=torch.uint8)
    labels = torch.arange(2000) % 10
    images.view(2000, 16)[torch.arange(2000), labels] = 255
    result = demo.softmax_baseline((images, labels), (images, labels))
    assert result["top1"] == 1.0
    shuffled = labels[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    assert demo.softmax_baseline((images, shuffled), (images, labels))["top1"] < 0.5


def test_classifying_counts_every_image_and_shows_one_of_each_class(tmp_path: Path) -> None:
    config = VitConfig(
        patch_size=7, embed_dim=16, depth=1, num_heads=2, mlp_dim=32, image_size=(28, 28), in_channels=1, num_classes=3
    )
    state = dict(vit.build(config).state_dict())
    state["head.bias"] = torch.tensor([0.0, 5.0, 0.0])  # a zero head and this bias: always class 1
    preprocess = Preprocess(
        image_size=(28, 28), in_channels=1, mean=(0.5,), std=(0.5,), class_names=("coat", "bag", "boot")
    )
    vit.save(state, ModelFile(model=config, preprocess=preprocess), tmp_path)
    labels = torch.tensor([0, 1, 1, 2])
    result = demo.classify(tmp_path, torch.zeros(4, 1, 28, 28, dtype=torch.uint8), labels)
    assert (result["top1"], result["num_images"]) == (0.5, 4)
    assert [(s["image"], s["label"], s["predicted"]) for s in result["shown"]] == [
        (0, "coat", "bag"),
        (1, "bag", "bag"),
        (3, "boot", "bag"),
    ]
    json.dumps(result)


def test_missing_images_say_what_would_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = demo.main(["images", "--data-root", str(tmp_path)])
    # Where Debian's package is installed, the images are always found.
    assert found == (0 if DEBIAN_FASHION_MNIST.is_dir() else 3)
    assert ("dataset-fashion-mnist" in capsys.readouterr().err) == (found == 3)
