"""Job descriptions of the experiments: small models on Fashion-MNIST, each job on one core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BATCH = 64
WARMUP = 50
NUM_TRAIN = 60_000
SEEDS = (0, 1, 2)
CLASSES = 10


def transformer(
    patch_size: int, embed_dim: int, depth: int, num_heads: int, mlp_dim: int, **more: Any
) -> dict[str, Any]:
    """A ViT on images of 28 x 28; with a `stem`, a hybrid. GELU is the exact one, which is faster on a CPU."""
    sizes = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return sizes | {"mlp_dim": mlp_dim, "image_size": 28, "in_channels": 1, "gelu": "exact"} | more


def resnet(layers: tuple[int, ...], width: int) -> dict[str, Any]:
    """A BiT ResNet on images of 28 x 28."""
    return {"resnet": {"layers": list(layers), "width": width}, "image_size": 28, "in_channels": 1}


def pretraining(
    name: str, model: Mapping[str, Any], *, steps: int, lr: float, seed: int, fraction: float = 1.0, **parts: Any
) -> dict[str, Any]:
    """A training job of so many steps on a fraction of the training images, which the seed chooses as well as the
    start and the order; evaluated at its end on all test images. `parts` go over the parts of that name.

    The learning rate stays constant after its warm-up, and it is the moving average of the weights that is evaluated:
    an evaluation within training then tells what a job of that length would have given.
    """
    spec: dict[str, Any] = {
        "kind": "pretrain",
        "name": name,
        "model": dict(model),
        "data": {
            "source": {"type": "torchvision", "name": "FashionMNIST", "download": "never"},
            "augment": {"crop": "resize", "flip": True},
        },
        "optim": {"name": "adamw", "lr": lr, "weight_decay": 0.05, "clip_grad_norm": 1.0},
        "schedule": {"total_steps": steps, "warmup_steps": min(WARMUP, steps), "decay": "constant"},
        "train": {
            "global_batch_size": BATCH,
            "precision": "fp32",
            "log_every_steps": 50,
            "seed": seed,
            "ema_decay": 0.99,
        },
        "zero": {"stage": 0},
        "resources": {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 1},
        "eval": {"batch_size": 500, "weights": "ema"},
    }
    if fraction < 1.0:
        spec["data"]["subset"] = {"fraction": fraction, "seed": seed}
    for part, values in parts.items():
        spec[part] = spec.get(part, {}) | values
    return spec
