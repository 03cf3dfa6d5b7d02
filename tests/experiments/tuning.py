"""`make experiments NAME=tuning`: a learning rate for each family of `claim`.

One seed, all images but a tenth that is held out of training and measured on; the test images are not looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.experiments.claim import MODELS
from tests.experiments.experiment import Experiment, Record, Run, main
from tests.experiments.specs import pretraining
from tests.experiments.summary import Spread, chart, draw_lines, grouped, markdown, top1

RATES = (1e-3, 3e-3, 5e-3, 9e-3)
STEPS = 400


def runs() -> list[Run]:
    """Every family at every rate."""
    return [run(family, lr) for family in MODELS for lr in RATES]


def run(family: str, lr: float) -> Run:
    spec = pretraining(f"tuning-{family}", MODELS[family], steps=STEPS, lr=lr, seed=0)
    spec["data"] |= {"holdout": {"fraction": 0.1, "seed": 0}}
    return Run(f"{family}/{lr:g}", {"family": family, "lr": lr}, spec)


def accuracies(records: Sequence[Record]) -> dict[str, dict[float, float]]:
    """Top-1 on the held-out images, by family and learning rate."""
    return {
        family: {float(r.labels["lr"]): top1(r) for r in sorted(group, key=lambda r: float(r.labels["lr"]))}
        for family, group in grouped(records, lambda r: str(r.labels["family"])).items()
    }


def best(found: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """The best rate of each family; of equal ones the lower."""
    return {family: max(by_rate, key=lambda rate: by_rate[rate]) for family, by_rate in found.items()}


def table(records: Sequence[Record]) -> str:
    """A row for each family, the best rate's accuracy in bold."""
    found = accuracies(records)
    chosen = best(found)
    rows = [
        [family, *[f"**{100 * a:.2f}**" if rate == chosen[family] else f"{100 * a:.2f}" for rate, a in by_rate.items()]]
        for family, by_rate in found.items()
    ]
    return markdown(["", *[f"{rate:g}" for rate in RATES]], rows)


def plot(records: Sequence[Record], out: Path) -> None:
    """tuning.png."""
    with chart(
        out / "tuning.png", f"{STEPS} steps, one seed", "learning rate", "top-1 on held-out images (%)", log_x=True
    ) as axes:
        lines = {f: {rate: Spread(a, 0.0, 1) for rate, a in by.items()} for f, by in accuracies(records).items()}
        draw_lines(axes, lines)


EXPERIMENT = Experiment("tuning", "Learning rates of the three families of `claim`", runs(), table, plot)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
