"""Small job descriptions and checkpoints that the tests of configs start from."""

from __future__ import annotations

from typing import Any

from configs.data import DataConfig
from configs.load import apply_overrides, parse_spec
from configs.model import ModelConfig, VitConfig
from configs.resolve import SourceCheckpoint
from configs.spec import JobSpec
from configs.wire import DatasetCard, Preprocess, SplitInfo

JOB_ID = "job_01JABCDEFGHJKMNPQRSTVWXYZ0"

PRETRAIN: dict[str, Any] = {
    "kind": "pretrain",
    "model": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "image_size": 16},
    "data": {"source": {"type": "folder", "name": "pictures"}, "train": "train", "eval": "val"},
    "schedule": {"total_epochs": 3},
    "train": {"global_batch_size": 64},
    "resources": {"workers": 2, "gpus_per_worker": 0},
}
FINETUNE: dict[str, Any] = {
    "kind": "finetune",
    "init_from": f"{JOB_ID}/best",
    "model": {"image_size": 24},
    "data": PRETRAIN["data"],
    "schedule": {"total_steps": 10},
    "train": {"global_batch_size": 64},
    "resources": {"workers": 2, "gpus_per_worker": 0},
}
EVALUATE: dict[str, Any] = {"kind": "evaluate", "init_from": "ckpt_x", "resources": {"gpus_per_worker": 0}}

CARD = DatasetCard(
    name="pictures",
    type="folder",
    num_classes=5,
    splits=(SplitInfo(name="train", num_examples=1000), SplitInfo(name="val", num_examples=200)),
    fingerprint="sha256:pictures",
)


def job(base: dict[str, Any], **overrides: Any) -> JobSpec:
    """The job of `base` with dotted overrides, dots written as double underscores."""
    return parse_spec(apply_overrides(base, {key.replace("__", "."): value for key, value in overrides.items()}))


def source(*, data: DataConfig | None = None, mean: tuple[float, ...] = (0.5,), **sizes: Any) -> SourceCheckpoint:
    """A checkpoint of PRETRAIN's model, with other sizes where given."""
    model = VitConfig.model_validate(PRETRAIN["model"] | {"image_size": (16, 16), "num_classes": 5} | sizes)
    preprocess = Preprocess(image_size=model.image_size, in_channels=model.in_channels, mean=mean, std=mean)
    return SourceCheckpoint("ckpt_x", "jobs/x/", model, preprocess, data)


def vit(variant: str, num_classes: int = 1000, **fields: Any) -> VitConfig:
    return ModelConfig.model_validate({"variant": variant, "num_classes": num_classes} | fields).vit()
