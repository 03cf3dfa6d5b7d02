"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from configs.train import Decay

STEPS_PERCENT = (30, 60, 90)
"""Of all steps, the warm-up included: google-research/big_transfer `bit_hyperrule.py`."""


def learning_rate(
    step: int,
    base_lr: float,
    warmup_steps: int,
    total_steps: int,
    decay: Decay,
    min_lr: float = 0.0,
) -> float:
    """The learning rate of update `step`, counted from 0: linear from exactly 0 to `base_lr` over `warmup_steps`,
    then by `decay` towards `min_lr` at `total_steps`; `steps` divides by ten after 30, 60 and 90 % of `total_steps`.

    With a warm-up, update 0 has rate 0 and changes no weight; the last update, `total_steps - 1`, is one step short
    of `min_lr`. facebookresearch/mae `util/lr_sched.py` has the same formula, google-research/big_vision `utils.py`,
    `create_learning_rate_schedule`, the same convention.

    Raises:
        ValueError: a negative step or warm-up, more warm-up than steps, or an unknown decay.
    """
    if step < 0 or total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"step {step}, warmup_steps {warmup_steps}, total_steps {total_steps} make no schedule")
    if step < warmup_steps:
        return base_lr * step / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if decay == "constant":
        return base_lr
    if decay == "steps":
        return base_lr * 0.1 ** sum(100 * step > percent * total_steps for percent in STEPS_PERCENT)
    if decay == "linear":
        return min_lr + (base_lr - min_lr) * (1.0 - progress)
    if decay == "cosine":
        return min_lr + (base_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown decay {decay!r}: expected linear, cosine, constant or steps")
