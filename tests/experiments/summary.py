"""Means over seeds, Markdown tables and plots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tests.experiments.experiment import Record
from tests.experiments.specs import SEEDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

K = TypeVar("K", bound=Hashable)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of one figure over seeds."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; one alone has no deviation (0)."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))

    def percent(self) -> str:
        """As in "86.31 ± 0.20", in percent; where there are not as many as there are seeds, with how many there are."""
        return self.text(100.0, 2)

    def text(self, scale: float, digits: int) -> str:
        """As `percent`, with another scale and so many digits."""
        mean = f"{scale * self.mean:.{digits}f}"
        if self.count == 1:
            return f"{mean} (one seed)"
        deviation = f"{mean} ± {scale * self.deviation:.{digits}f}"
        return deviation if self.count == len(SEEDS) else f"{deviation} ({self.count} seeds)"


def grouped(records: Iterable[Record], key: Callable[[Record], K]) -> dict[K, list[Record]]:
    """Records by key, keys in the order in which they first come."""
    groups: dict[K, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def spreads(records: Iterable[Record], key: Callable[[Record], K], value: Callable[[Record], float]) -> dict[K, Spread]:
    """The spread of a value within each group."""
    return {name: Spread.of([value(r) for r in group]) for name, group in grouped(records, key).items()}


def cells(found: Mapping[K, Spread], keys: Iterable[K]) -> list[str]:
    """`percent` of each key; a dash for one that has not been run."""
    return [found[key].percent() if key in found else "–" for key in keys]


def of_seeds(records: Iterable[Record]) -> str:
    """What points and bars of a plot are."""
    count = len({record.labels["seed"] for record in records})
    return "one seed" if count == 1 else f"mean and deviation of {count} seeds"


def top1(record: Record) -> float:
    """Accuracy on all test images at the end of training."""
    return record.last("eval/top1")


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *[[str(cell) for cell in row] for row in rows]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


@contextmanager
def chart(path: Path, title: str, x: str, y: str, *, log_x: bool = False) -> Iterator[Axes]:
    """Axes to draw on; saved as a PNG afterwards, with a legend if anything has a label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log" if log_x else "linear")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    yield axes
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_lines(axes: Axes, lines: Mapping[str, Mapping[float, Spread]]) -> None:
    """A line for each name through the means, in percent, with a bar of one standard deviation each way."""
    for number, (name, points) in enumerate(lines.items()):
        xs = sorted(points)
        axes.errorbar(
            xs,
            [100 * points[x].mean for x in xs],
            yerr=[100 * points[x].deviation for x in xs],
            label=name,
            color=COLOURS[number],
            marker=MARKERS[number],
            capsize=3,
        )


def draw_bars(axes: Axes, bars: Mapping[str, Spread]) -> None:
    """A point for each name from the top down, in percent, with a bar of one standard deviation each way."""
    for number, spread in enumerate(bars.values()):
        axes.errorbar(
            100 * spread.mean,
            number,
            xerr=100 * spread.deviation,
            color=COLOURS[0],
            marker=MARKERS[0],
            capsize=3,
        )
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
