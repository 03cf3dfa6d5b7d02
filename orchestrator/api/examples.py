"""Bodies shown in the OpenAPI document. Tests submit them."""

from __future__ import annotations

from typing import Any

PRETRAIN: dict[str, Any] = {
    "spec": {
        "kind": "pretrain",
        "name": "fashion-small",
        "labels": {"team": "vision"},
        "model": {
            "patch_size": 7,
            "embed_dim": 64,
            "depth": 4,
            "num_heads": 4,
            "mlp_dim": 128,
            "image_size": 28,
            "in_channels": 1,
        },
        "data": {"source": {"type": "torchvision", "name": "FashionMNIST"}},
        "schedule": {"total_epochs": 5, "warmup_steps": 100},
        "train": {"global_batch_size": 128},
        "zero": {"stage": 1},
        "resources": {"workers": 2, "gpus_per_worker": 0},
    },
    "overrides": {"optim.lr": 0.003},
}

FINETUNE: dict[str, Any] = {
    "spec": {
        "kind": "finetune",
        "name": "fashion-small-42",
        "init_from": "job_01JD3Q8Z6M0000000000000000/best",
        "model": {"image_size": 42, "in_channels": 1},
        "data": {"source": {"type": "torchvision", "name": "FashionMNIST"}},
        "optim": {"name": "sgd", "lr": 0.03},
        "schedule": {"total_steps": 500, "warmup_steps": 50},
        "train": {"global_batch_size": 128},
        "resources": {"workers": 2, "gpus_per_worker": 0},
        "queue": {"depends_on": ["job_01JD3Q8Z6M0000000000000000"]},
    }
}

EXPORT: dict[str, Any] = {
    "spec": {
        "kind": "export",
        "name": "fashion-small-timm",
        "init_from": "job_01JD3Q8Z6M0000000000000000/best",
        "format": "timm",
        "resources": {"gpus_per_worker": 0},
    }
}

INSPECT: dict[str, Any] = {
    "spec": {
        "kind": "inspect",
        "name": "fashion-small-pictures",
        "init_from": "job_01JD3Q8Z6M0000000000000000/best",
        "pictures": ["position_similarity", "attention_distance"],
        "num_images": 128,
        "resources": {"gpus_per_worker": 0},
    }
}

EDIT: dict[str, Any] = {"priority": 90, "labels": {"team": "vision", "paper": "yes"}}
PIN: dict[str, Any] = {"pinned": True}
FORK: dict[str, Any] = {"checkpoint": "latest", "overrides": {"resources.workers": 1}, "name": "narrower"}
DATASET: dict[str, Any] = {"name": "flowers", "path": "flowers"}
TOKEN: dict[str, Any] = {"name": "ci", "role": "member", "expires_in_s": 2592000}

IMPORT = {
    "file": "vit_small_patch16_224.safetensors",
    "num_bytes": 88_197_728,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "source": "timm/vit_small_patch16_224.augreg_in21k",
    "format": "timm",
}
PART_URLS = {"parts": [1, 2, 3]}

VTAB: dict[str, Any] = {
    "name": "fashion-small-vtab",
    "init_from": "job_01JD3Q8Z6M0000000000000000/best",
    "tasks": [
        {"name": "fashion", "group": "natural", "source": {"type": "torchvision", "name": "FashionMNIST"}},
        {"name": "digits", "group": "natural", "source": {"type": "torchvision", "name": "MNIST"}},
    ],
    "steps": 100,
    "overrides": {"model.image_size": 28, "resources.gpus_per_worker": 0},
}
