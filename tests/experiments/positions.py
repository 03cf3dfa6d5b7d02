"""`make experiments NAME=positions`: the paper's Table 8 (D.4), small: which position embedding, and where it is added.

49 patches, everything else equal, the learning rate too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.experiments.claim import LEARNING_RATES
from tests.experiments.experiment import Experiment, Record, Run, main
from tests.experiments.specs import SEEDS, pretraining, transformer
from tests.experiments.summary import chart, draw_bars, grouped, markdown, of_seeds, spreads, top1

KINDS = {
    "none": ("none", "stem"),
    "1-D": ("learned", "stem"),
    "1-D, every layer": ("learned", "every_layer"),
    "1-D, every layer, shared": ("learned", "every_layer_shared"),
    "2-D": ("learned_2d", "stem"),
    "relative": ("relative", "stem"),
    "2-D sines and cosines, fixed": ("sincos2d", "stem"),
}
STEPS = 400


def runs() -> list[Run]:
    """Every kind with every seed."""
    return [run(kind, seed) for seed in SEEDS for kind in KINDS]


def run(kind: str, seed: int) -> Run:
    embedding, place = KINDS[kind]
    model = transformer(4, 48, 2, 3, 96, pos_embed=embedding, pos_embed_at=place)
    spec = pretraining("positions", model, steps=STEPS, lr=LEARNING_RATES["ViT"], seed=seed)
    return Run(f"{embedding}/{place}/seed-{seed}", {"kind": kind, "seed": seed}, spec)


def table(records: Sequence[Record]) -> str:
    """Top-1 and loss of each kind."""
    groups = grouped(records, lambda r: str(r.labels["kind"]))
    accuracy = spreads(records, lambda r: r.labels["kind"], top1)
    loss = spreads(records, lambda r: r.labels["kind"], lambda r: r.last("eval/loss"))
    rows = [
        [
            kind,
            f"{group[0].parameters:,}",
            accuracy[kind].percent(),
            loss[kind].text(1.0, 3),
        ]
        for kind, group in groups.items()
    ]
    return markdown(["position embedding", "parameters", "test top-1 (%)", "test loss"], rows)


def plot(records: Sequence[Record], out: Path) -> None:
    """positions.png."""
    title = f"{STEPS} steps, {of_seeds(records)}"
    with chart(out / "positions.png", title, "test top-1 (%)", "") as axes:
        draw_bars(axes, spreads(records, lambda r: str(r.labels["kind"]), top1))


EXPERIMENT = Experiment("positions", "Position embeddings", runs(), table, plot)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
