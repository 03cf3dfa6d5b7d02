"""First filters as tiles: principal components of the patch embedding (paper, figure 7 left), and a stem's kernels."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from vit.filters import Components
from workers.drawing.canvas import Drawing, Floats, below_title, draw_filter, new_figure

MAX_STEM_FILTERS = 256


def draw_patch_filters(components: Components, num_filters: int) -> Drawing:
    """The principal components of the filters that make tokens of patches."""
    filters, explained = components.filters.numpy(), components.explained.numpy()
    count, channels, side, _ = filters.shape
    title = f"Patch-embedding filters: first {count} principal components"
    figure = new_figure(
        7.2,
        _height(count, 7, label=True),
        title,
        f"{num_filters} filters of {side} x {side} pixels; below each component: its share of their variance. "
        f"{_scale(channels)}",
    )
    _tiles(figure, filters, 7, [_share(value) for value in explained])
    half = int(np.searchsorted(np.cumsum(explained), 0.5) + 1)
    caption = (
        f"The first {count} principal components of {num_filters} patch-embedding filters of {side} x {side} pixels, "
        f"strongest first: the first explains {_share(float(explained[0]))} of their variance, the first {half} half "
        f"of it, all {count} together {_share(float(explained.sum()))}."
    )
    numbers = {"components": filters, "explained": explained}
    return Drawing("patch_filters", title, caption, figure, numbers)


def draw_stem_filters(filters: Floats) -> Drawing:
    """The kernels of the stem's first convolution, (D, channels, P, P), as they are applied."""
    count, channels, side, _ = filters.shape
    shown = filters[:MAX_STEM_FILTERS]
    columns = 16 if len(shown) > 64 else 8 * max(1, math.ceil(len(shown) / 64))
    title = f"First convolution of the stem: {count} filters"
    which = "" if len(shown) == count else f" The first {len(shown)} are shown."
    figure = new_figure(
        7.2,
        _height(len(shown), columns, label=False),
        title,
        f"{side} x {side} pixels, weight-standardised as they are applied.{which} {_scale(channels)}",
    )
    _tiles(figure, shown, columns, None)
    caption = (
        f"The {count} filters, {side} x {side} pixels and {channels} channel{'s' if channels > 1 else ''}, of the "
        "first convolution, standardised as they are applied."
    )
    return Drawing("stem_filters", title, caption, figure, {"filters": filters})


def _scale(channels: int) -> str:
    return "Grey is 0, white positive." if channels == 1 else "Grey is 0; each is scaled to its own peak."


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.0995 else f"{100 * value:.1f} %"


def _height(count: int, columns: int, *, label: bool) -> float:
    tile = 7.0 / columns
    return 0.72 + math.ceil(count / columns) * (tile + (0.12 if label else 0.0))


def _tiles(figure: Figure, filters: Floats, columns: int, labels: list[str] | None) -> None:
    rows = math.ceil(len(filters) / columns)
    height = figure.get_size_inches()[1]
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0.017,
        right=0.983,
        bottom=0.1 / height,
        top=below_title(height),
        wspace=0.08,
        hspace=0.08 if labels is None else 0.22,
    )
    for index, weights in enumerate(filters):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        draw_filter(axes, weights)
        if labels is not None:
            axes.set_xlabel(labels[index], fontsize=7, labelpad=2)
