"""`make experiments NAME=few_shot`: accuracy of a linear classifier on the features of 5 and 10 examples of each class,
measured within training (paper, 4.1 and Figure 4).

The paper pre-trains on other images than it tests few-shot accuracy on; here both are Fashion-MNIST.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.experiments.claim import LEARNING_RATES, MODELS
from tests.experiments.experiment import Experiment, Record, Run, main
from tests.experiments.specs import BATCH, SEEDS, pretraining
from tests.experiments.summary import Spread, chart, draw_lines, markdown

SHOTS = (5, 10)
STEPS = 480
EVERY = 80


def runs() -> list[Run]:
    """One for each seed."""
    return [run(seed) for seed in SEEDS]


def run(seed: int) -> Run:
    spec = pretraining(
        "few-shot",
        MODELS["ViT"],
        steps=STEPS,
        lr=LEARNING_RATES["ViT"],
        seed=seed,
        eval={"every_steps": EVERY, "few_shot": {"shots": list(SHOTS), "num_seeds": 3}},
    )
    return Run(f"seed-{seed}", {"seed": seed}, spec)


def by_step(records: Sequence[Record], metric: str) -> dict[int, Spread]:
    """The spread of a metric over seeds at each step it was measured at."""
    steps = sorted(int(step) for step in records[0].metrics[metric])
    return {step: Spread.of([r.metrics[metric][str(step)] for r in records]) for step in steps}


def table(records: Sequence[Record]) -> str:
    """Accuracies by images seen."""
    lines = {f"{shots} shots": by_step(records, f"eval/few_shot/{shots}") for shots in SHOTS}
    lines["its own classifier"] = by_step(records, "eval/top1")
    steps = sorted(next(iter(lines.values())))
    rows = [[f"{step * BATCH:,}", *[points[step].percent() for points in lines.values()]] for step in steps]
    return markdown(["images seen", *lines], rows)


def plot(records: Sequence[Record], out: Path) -> None:
    """few_shot.png."""
    title = f"ViT, mean and deviation of {len(SEEDS)} seeds"
    with chart(out / "few_shot.png", title, "images seen", "test accuracy (%)") as axes:
        lines = {f"{shots} examples of each class": f"eval/few_shot/{shots}" for shots in SHOTS}
        lines["its own classifier"] = "eval/top1"
        draw_lines(
            axes,
            {name: {float(s * BATCH): v for s, v in by_step(records, m).items()} for name, m in lines.items()},
        )


EXPERIMENT = Experiment("few_shot", "Few-shot accuracy within training", runs(), table, plot)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
