"""`make experiments NAME=claim`: ViT, hybrid and BiT ResNet at the same operations on 1, 10 and 100 % of Fashion-MNIST
(paper, 4.3 and 4.4).

Two plots: accuracy against the number of training images, all with the same number of steps; and on all images against
the exaFLOPs of training, each budget with a schedule of its own. Learning rates are those that `tuning` chose.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.experiments.experiment import Experiment, Record, Run, main
from tests.experiments.specs import NUM_TRAIN, SEEDS, pretraining, resnet, transformer
from tests.experiments.summary import chart, draw_lines, grouped, markdown, spreads, top1

MODELS = {
    "ViT": transformer(4, 48, 2, 3, 160),
    "hybrid": transformer(1, 48, 2, 3, 128, stem={"layers": [], "width": 32}),
    "BiT": resnet((1, 1), 32),
}
"""49 patches in ViT and hybrid; the operations of one image differ by at most 2 % (a test looks)."""
LEARNING_RATES = {"ViT": 4e-3, "hybrid": 4e-3, "BiT": 4e-3}
"""What `tuning` found best (a test looks)."""
FRACTIONS = (0.01, 0.1, 1.0)
STEPS = 800
SHORTER = (200, 400)
"""Further budgets, on all images."""


def runs() -> list[Run]:
    """Every family, seed and amount of data at the full budget; on all data also at the shorter ones."""
    wanted = [(fraction, STEPS) for fraction in FRACTIONS] + [(1.0, steps) for steps in SHORTER]
    return [run(family, fraction, steps, seed) for seed in SEEDS for fraction, steps in wanted for family in MODELS]


def run(family: str, fraction: float, steps: int, seed: int) -> Run:
    spec = pretraining(
        f"claim-{family}",
        MODELS[family],
        steps=steps,
        lr=LEARNING_RATES[family],
        seed=seed,
        fraction=fraction,
    )
    labels = {"family": family, "images": round(NUM_TRAIN * fraction), "steps": steps, "seed": seed}
    return Run(f"{family}/{fraction:g}/{steps}/seed-{seed}", labels, spec)


def table(records: Sequence[Record]) -> str:
    """Cost of each family, and its top-1 for each amount of data and budget."""
    columns = [(round(NUM_TRAIN * fraction), STEPS) for fraction in FRACTIONS]
    columns += [(NUM_TRAIN, steps) for steps in SHORTER]
    head = ["", "parameters", "MMAC", "exaFLOPs"] + [f"{images:,} images, {steps} steps" for images, steps in columns]
    accuracy = spreads(records, lambda r: (r.labels["family"], r.labels["images"], r.labels["steps"]), top1)
    rows = []
    for family, group in grouped(records, lambda r: r.labels["family"]).items():
        full = next(r for r in group if r.steps == STEPS)
        cells = [accuracy[family, images, steps].percent() for images, steps in columns]
        rows.append([family, f"{full.parameters:,}", f"{full.macs / 1e6:.2f}", f"{full.exaflops:.2e}", *cells])
    return markdown(head, rows)


def plot(records: Sequence[Record], out: Path) -> None:
    """claim-images.png and claim-exaflops.png."""
    families = grouped(records, lambda r: str(r.labels["family"]))
    with chart(
        out / "claim-images.png",
        f"{STEPS} steps, mean and deviation of {len(SEEDS)} seeds",
        "training images",
        "test top-1 (%)",
        log_x=True,
    ) as axes:
        full = {family: [r for r in group if r.steps == STEPS] for family, group in families.items()}
        draw_lines(axes, {f: spreads(group, lambda r: float(r.labels["images"]), top1) for f, group in full.items()})
    with chart(
        out / "claim-exaflops.png",
        f"All {NUM_TRAIN:,} images, mean and deviation of {len(SEEDS)} seeds",
        "exaFLOPs of training",
        "test top-1 (%)",
        log_x=True,
    ) as axes:
        whole = {family: [r for r in group if r.labels["images"] == NUM_TRAIN] for family, group in families.items()}
        draw_lines(axes, {family: spreads(group, lambda r: r.exaflops, top1) for family, group in whole.items()})


EXPERIMENT = Experiment(
    "claim", "ViT, hybrid and BiT at the same operations on 1, 10 and 100 % of Fashion-MNIST", runs(), table, plot
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
