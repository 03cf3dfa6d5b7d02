"""`make experiments NAME=claim`: ViT, hybrid and BiT ResNet at the same operations on 1, 10 and 100 % of Fashion-MNIST
(paper, 4.3 and 4.4).

Three plots: accuracy against the number of training images; on all images against the exaFLOPs of training; and
few-shot accuracy within training (paper, 4.1 and Figure 4). The paper pre-trains on other images than it tests few-shot
accuracy on; here both are Fashion-MNIST. Learning rates are those that `tuning` chose.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.experiments.experiment import Experiment, Record, Run, main
from tests.experiments.specs import BATCH, NUM_TRAIN, SEEDS, pretraining, resnet, transformer
from tests.experiments.summary import Spread, cells, chart, draw_lines, grouped, markdown, of_seeds, spreads, top1

MODELS = {
    "ViT": transformer(4, 48, 2, 3, 160),
    "hybrid": transformer(1, 48, 2, 3, 128, stem={"layers": [], "width": 32}),
    "BiT": resnet((1, 1), 32),
}
"""49 patches in ViT and hybrid; the operations of one image differ by at most 2 % (a test looks)."""
LEARNING_RATES = {"ViT": 5e-3, "hybrid": 3e-3, "BiT": 9e-3}
"""What `tuning` found best (a test looks)."""
STEPS = {0.01: 250, 0.1: 500, 1.0: 1000}
"""By the fraction of the training images: 27, 5 and 1 times through them."""
EVERY = 250
"""Steps from one evaluation to the next."""
SHOTS = (5, 10)


def runs() -> list[Run]:
    """Every family, seed and amount of data."""
    return [run(family, fraction, seed) for seed in SEEDS for fraction in STEPS for family in MODELS]


def run(family: str, fraction: float, seed: int) -> Run:
    within: dict[str, Any] = {"every_steps": EVERY}
    if fraction == 1.0 and family == "ViT":
        within["few_shot"] = {"shots": list(SHOTS), "num_seeds": 3}
    spec = pretraining(
        f"claim-{family}",
        MODELS[family],
        steps=STEPS[fraction],
        lr=LEARNING_RATES[family],
        seed=seed,
        fraction=fraction,
        eval=within,
    )
    labels = {"family": family, "images": round(NUM_TRAIN * fraction), "seed": seed}
    return Run(f"{family}/{fraction:g}/seed-{seed}", labels, spec)


def by_family(records: Sequence[Record]) -> dict[str, list[Record]]:
    return grouped(records, lambda r: str(r.labels["family"]))


def on_all_images(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs on all images, by family."""
    return by_family([r for r in records if r.labels["images"] == NUM_TRAIN])


def by_step(records: Sequence[Record], metric: str) -> dict[int, Spread]:
    """The spread of a metric over seeds at each step it was measured at."""
    steps = sorted(int(step) for step in records[0].metrics[metric])
    return {step: Spread.of([r.metrics[metric][str(step)] for r in records]) for step in steps}


def cost_and_accuracy(records: Sequence[Record]) -> str:
    """Cost of each family, and its top-1 for each amount of data."""
    rows = []
    for family, group in by_family(records).items():
        accuracy = spreads(group, lambda r: int(r.labels["images"]), top1)
        cost = [f"{group[0].parameters:,}", f"{group[0].macs / 1e6:.2f}", f"{group[0].exaflops / group[0].images:.2e}"]
        rows.append([family, *cost, *cells(accuracy, [round(NUM_TRAIN * fraction) for fraction in STEPS])])
    amounts = [f"{round(NUM_TRAIN * fraction):,} images, {steps} steps" for fraction, steps in STEPS.items()]
    return markdown(["", "parameters", "MMAC", "exaFLOPs per image seen", *amounts], rows)


def within_training(records: Sequence[Record]) -> str:
    """Accuracies as training goes on; few-shot ones where they were measured."""
    rows = []
    metrics = ["eval/top1", *[f"eval/few_shot/{shots}" for shots in SHOTS]]
    for (family, images), group in grouped(records, lambda r: (r.labels["family"], r.labels["images"])).items():
        lines = [by_step(group, metric) for metric in metrics if metric in group[0].metrics]
        for step in lines[0]:
            found = [points[step].percent() for points in lines] + [""] * (len(metrics) - len(lines))
            rows.append([family, f"{images:,}", f"{step * BATCH:,}", *found])
    head = ["", "training images", "images seen", "its own classifier", *[f"{shots} shots" for shots in SHOTS]]
    return markdown(head, sorted(rows, key=lambda row: list(MODELS).index(row[0])))


def table(records: Sequence[Record]) -> str:
    """Both tables."""
    return cost_and_accuracy(records) + "\n" + within_training(records)


def plot(records: Sequence[Record], out: Path) -> None:
    """claim-images.png, claim-exaflops.png and claim-few-shot.png."""
    spread = of_seeds(records)
    accuracy = "test top-1 (%)"
    with chart(out / "claim-images.png", f"Test top-1, {spread}", "training images", accuracy, log_x=True) as axes:
        families = by_family(records)
        draw_lines(
            axes, {f: spreads(group, lambda r: float(r.labels["images"]), top1) for f, group in families.items()}
        )
    title = f"All {NUM_TRAIN:,} images, {spread}"
    with chart(out / "claim-exaflops.png", title, "exaFLOPs of training", accuracy, log_x=True) as axes:
        draw_lines(axes, {f: _against_exaflops(group) for f, group in on_all_images(records).items()})
    with chart(out / "claim-few-shot.png", f"ViT, {spread}", "images seen", "few-shot test accuracy (%)") as axes:
        measured = on_all_images(records).get("ViT", [])
        lines = {
            f"{shots} examples of each class": {
                float(step * BATCH): found for step, found in by_step(measured, f"eval/few_shot/{shots}").items()
            }
            for shots in SHOTS
            if measured
        }
        draw_lines(axes, lines)


def _against_exaflops(group: Sequence[Record]) -> dict[float, Spread]:
    return {group[0].exaflops * step / group[0].steps: found for step, found in by_step(group, "eval/top1").items()}


EXPERIMENT = Experiment(
    "claim", "ViT, hybrid and BiT at the same operations on 1, 10 and 100 % of Fashion-MNIST", runs(), table, plot
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
