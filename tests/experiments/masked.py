"""`make experiments NAME=masked`: masked patch prediction without labels, then fine-tuning on few labelled images
(paper, B.1.2), against the same training from scratch, each at two learning rates.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.experiments.claim import LEARNING_RATES
from tests.experiments.experiment import Experiment, Record, Run, main
from tests.experiments.specs import SEEDS, pretraining, transformer
from tests.experiments.summary import chart, draw_lines, grouped, markdown, of_seeds, spreads, top1

MODEL = transformer(4, 48, 2, 3, 96)
PRETRAIN_STEPS, STEPS = 400, 200
FRACTION = 0.01
RATES = (1e-3, 4e-3)
PRETRAINED, SCRATCH = "masked patch prediction first", "from scratch"


def runs() -> list[Run]:
    """For each seed a pre-training; at each rate a fine-tuning of it and a training of a new model."""
    return [run for seed in SEEDS for run in (_pretraining(seed), *_trainings(seed))]


def _pretraining(seed: int) -> Run:
    objective = {"objective": "masked_patch"}
    spec = pretraining("masked", MODEL, steps=PRETRAIN_STEPS, lr=LEARNING_RATES["ViT"], seed=seed, train=objective)
    return Run(f"pretraining/seed-{seed}", {"start": "", "seed": seed}, spec)


def _trainings(seed: int) -> list[Run]:
    found = []
    for lr in RATES:
        spec = pretraining("labelled", MODEL, steps=STEPS, lr=lr, seed=seed, fraction=FRACTION)
        found.append(Run(f"scratch/{lr:g}/seed-{seed}", {"start": SCRATCH, "lr": lr, "seed": seed}, spec))
        tuned = spec | {"kind": "finetune", "weights": "ema", "model": {"image_size": 28, "in_channels": 1}}
        labels = {"start": PRETRAINED, "lr": lr, "seed": seed}
        found.append(Run(f"finetune/{lr:g}/seed-{seed}", labels, tuned, after=f"pretraining/seed-{seed}"))
    return found


def labelled(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs that learned from labels, by how they started."""
    return grouped([r for r in records if r.labels["start"]], lambda r: str(r.labels["start"]))


def table(records: Sequence[Record]) -> str:
    """Top-1 of both at each rate."""
    rows = []
    for start, group in labelled(records).items():
        accuracy = spreads(group, lambda r: r.labels["lr"], top1)
        rows.append([start, *[accuracy[lr].percent() for lr in RATES]])
    return markdown(["test top-1 (%) at learning rate", *[f"{lr:g}" for lr in RATES]], rows)


def plot(records: Sequence[Record], out: Path) -> None:
    """masked.png."""
    title = f"{STEPS} steps on 600 labelled images, {of_seeds(records)}"
    with chart(out / "masked.png", title, "learning rate", "test top-1 (%)", log_x=True) as axes:
        lines = {s: spreads(g, lambda r: float(r.labels["lr"]), top1) for s, g in labelled(records).items()}
        draw_lines(axes, lines)


EXPERIMENT = Experiment("masked", "Masked patch prediction, then fine-tuning", runs(), table, plot)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
