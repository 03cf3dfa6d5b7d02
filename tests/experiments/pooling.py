"""`make experiments NAME=pooling`: class token or the mean of all tokens (paper, D.3), each at
several learning rates.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.experiments.experiment import Experiment, Record, Run, main
from tests.experiments.specs import SEEDS, pretraining, transformer
from tests.experiments.summary import cells, chart, draw_lines, grouped, markdown, of_seeds, spreads, top1

POOLS = {"class token": "cls", "GAP": "gap"}
RATES = (2e-3, 6e-3)
STEPS = 400


def runs() -> list[Run]:
    """Both, at every rate, with every seed."""
    return [run(name, lr, seed) for seed in SEEDS for lr in RATES for name in POOLS]


def run(name: str, lr: float, seed: int) -> Run:
    model = transformer(4, 48, 2, 3, 96, pool=POOLS[name])
    spec = pretraining("pooling", model, steps=STEPS, lr=lr, seed=seed)
    return Run(f"{POOLS[name]}/{lr:g}/seed-{seed}", {"pool": name, "lr": lr, "seed": seed}, spec)


def table(records: Sequence[Record]) -> str:
    """Top-1 of both at each rate."""
    accuracy = spreads(records, lambda r: (r.labels["pool"], r.labels["lr"]), top1)
    rows = [[name, *cells(accuracy, [(name, lr) for lr in RATES])] for name in POOLS]
    return markdown(["test top-1 (%) at learning rate", *[f"{lr:g}" for lr in RATES]], rows)


def plot(records: Sequence[Record], out: Path) -> None:
    """pooling.png."""
    title = f"{STEPS} steps, {of_seeds(records)}"
    with chart(out / "pooling.png", title, "learning rate", "test top-1 (%)", log_x=True) as axes:
        groups = grouped(records, lambda r: str(r.labels["pool"]))
        draw_lines(axes, {name: spreads(g, lambda r: float(r.labels["lr"]), top1) for name, g in groups.items()})


EXPERIMENT = Experiment("pooling", "Class token against the mean of all tokens", runs(), table, plot)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
