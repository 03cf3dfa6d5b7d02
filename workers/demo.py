"""The parts of `make demo` that need torch, each a process that prints one JSON object.

python -m workers.demo images   --data-root DIR --download auto|never    where Fashion-MNIST was found
python -m workers.demo baseline --data-root DIR                          softmax regression on pixels
python -m workers.demo classify --data-root DIR --model FOLDER           a fetched model on the test images
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import vit
from configs.data import TorchvisionSource
from configs.datasets import TORCHVISION_CARDS
from vit.classify import predict
from workers.data.errors import DataError
from workers.data.torchvision_sets import open_torchvision

_EPOCHS, _BATCH, _LR = 8, 512, 3e-3
_NUM_SHOWN = 10


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m workers.demo")
    parser.add_argument("what", choices=("images", "baseline", "classify"))
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--download", choices=("auto", "never"), default="never")
    parser.add_argument("--model", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.what == "images":
            result = {split: len(_read(split, given.data_root, given.download)[1]) for split in ("train", "test")}
        elif given.what == "baseline":
            result = softmax_baseline(_read("train", given.data_root), _read("test", given.data_root))
        else:
            result = classify(given.model, *_read("test", given.data_root))
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def softmax_baseline(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int = 0) -> dict[str, Any]:
    """Top-1 of a linear model on pixels: what a ViT has to beat. Images uint8 (n, C, H, W), labels int64 (n,)."""
    started = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    images, labels = _flat(train[0]), train[1]
    layer = torch.nn.Linear(images.shape[1], 10)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=_LR)
    for epoch in range(_EPOCHS):
        optimizer.param_groups[0]["lr"] = _LR * (1 - epoch / _EPOCHS)
        for batch in torch.randperm(len(labels), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(layer(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.inference_mode():
        correct = (layer(_flat(test[0])).argmax(1) == test[1]).sum().item()
    return {"top1": correct / len(test[1]), "seconds": time.monotonic() - started}


def classify(folder: Path, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Top-1 of a fetched model on all test images, and what it says of one image of every class."""
    model = vit.load(folder)
    names = model.preprocess.class_names if model.preprocess else None
    probabilities = predict(model, images, batch_size=500)
    chosen = probabilities.argmax(1)
    first = [int((labels == label).nonzero()[0]) for label in range(min(_NUM_SHOWN, model.config.num_classes))]
    shown = [
        {
            "image": index,
            "label": names[labels[index]] if names else str(int(labels[index])),
            "predicted": names[chosen[index]] if names else str(int(chosen[index])),
            "probability": float(probabilities[index].max()),
        }
        for index in first
    ]
    return {"top1": (chosen == labels).sum().item() / len(labels), "num_images": len(labels), "shown": shown}


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 255.0 - 0.5


def _read(split: str, data_root: Path, download: Any = "never") -> tuple[Tensor, Tensor]:
    source = TorchvisionSource(type="torchvision", name="FashionMNIST", download=download)
    found = open_torchvision(source, split, data_root, channels=1)
    expected = TORCHVISION_CARDS["FashionMNIST"].num_examples(split)
    if len(found) != expected:
        raise DataError(f"Fashion-MNIST ({split}) holds {len(found)} images and should hold {expected}")
    return torch.stack([found.read(index) for index in range(len(found))]), torch.from_numpy(found.labels)


if __name__ == "__main__":
    # Products this small only lose by being divided among threads.
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
