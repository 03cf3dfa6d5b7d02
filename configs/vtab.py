"""The VTAB-1k protocol (Zhai et al. 2019; paper, 4.1 and B.1.1): a fine-tune for each data set, all with one setting,
on 1,000 of its training images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.load import merge

NUM_EXAMPLES, NUM_HELD_OUT = 1000, 200
STEPS = 2500
SUITE_LABEL, TASK_LABEL, GROUP_LABEL = "vtab", "vtab_task", "vtab_group"
"""The labels by which a suite's jobs are known."""


def task_spec(
    data: Mapping[str, Any], *, init_from: str, steps: int = STEPS, held_out: bool = False, seed: int = 0
) -> dict[str, Any]:
    """The job description of one data set.

    Table 4 of the paper: SGD with momentum 0.9, batch 512, learning rate 0.01, cosine decay, no weight decay, global
    norm clipped to 1, at 384 pixels, 2,500 steps. Ours, for the paper does not say: warm-up of a tenth of the steps,
    and no crop and no flip, which would change what tasks about places and directions ask for.

    Args:
        data: source, train and eval.
        held_out: train on 800 of the 1,000 images and measure on the other 200, to choose settings by.
    """
    chosen = dict(data) | {"subset": {"examples": NUM_EXAMPLES, "seed": seed}}
    if held_out:
        chosen.pop("eval")  # what is held out is measured instead
        chosen["holdout"] = {"examples": NUM_HELD_OUT, "of": "subset", "seed": seed}
    spec: dict[str, Any] = {
        "kind": "finetune",
        "init_from": init_from,
        "model": {"image_size": 384},
        "data": {"augment": {"crop": "resize", "flip": False}},
        "optim": {"name": "sgd", "momentum": 0.9, "lr": 0.01, "weight_decay": 0.0, "clip_grad_norm": 1.0},
        "schedule": {"total_steps": steps, "warmup_steps": steps // 10, "decay": "cosine"},
        "train": {"global_batch_size": 512, "seed": seed},
        "checkpoint": {"every_steps": max(1, steps // 5)},
    }
    return merge(spec, {"data": chosen})
