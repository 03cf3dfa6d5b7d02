"""First filters as tiles: principal components of the patch embedding (paper, figure 7 left), and a stem's kernels."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from vit.filters import Components
from workers.drawing.canvas import Drawing, Floats, bare, filter_image, new_figure

MAX_STEM_FILTERS = 256
LABEL = 0.24
"""Inches below a tile for its label."""


def draw_patch_filters(components: Components, num_filters: int) -> Drawing:
    """The principal components of the filters that make tokens of patches."""
    filters, explained = components.filters.numpy(), components.explained.numpy()
    count, channels, side, _ = filters.shape
    title = f"Patch-embedding filters: first {count} principal components"
    figure = new_figure(
        7.2,
        0.72 + math.ceil(count / 7) * (0.93 + LABEL),
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
    columns = 8 if len(shown) <= 64 else 16
    title = f"First convolution of the stem: {count} filters"
    which = "" if len(shown) == count else f", the first {len(shown)}"
    wall = _wall(shown, columns)
    height = 0.72 + 6.96 * wall.shape[0] / wall.shape[1]
    figure = new_figure(
        7.2,
        height,
        title,
        f"{side} x {side} pixels, standardised as they are applied{which}. {_scale(channels)}",
    )
    axes = figure.add_axes((0.12 / 7.2, 0.1 / height, 6.96 / 7.2, (height - 0.72) / height))
    axes.imshow(wall, interpolation="nearest")
    bare(axes)
    caption = (
        f"The {count} filters, {side} x {side} pixels and {channels} channel{'s' if channels > 1 else ''}, of the "
        "first convolution, standardised as they are applied."
    )
    return Drawing("stem_filters", title, caption, figure, {"filters": filters})


def _scale(channels: int) -> str:
    return "Grey is 0, white positive." if channels == 1 else "Grey is 0; each is scaled to its own peak."


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.0995 else f"{100 * value:.1f} %"


def _wall(filters: Floats, columns: int) -> Floats:
    """One picture of all filters, (height, width, 3), white between them."""
    count, _, side, _ = filters.shape
    rows = math.ceil(count / columns)
    wall = np.ones((rows * (side + 1) - 1, columns * (side + 1) - 1, 3), dtype=np.float32)
    for index, weights in enumerate(filters):
        top, left = index // columns * (side + 1), index % columns * (side + 1)
        wall[top : top + side, left : left + side] = filter_image(weights)
    return wall


def _tiles(figure: Figure, filters: Floats, columns: int, labels: list[str]) -> None:
    """Filters side by side, with a line below each."""
    width, height = figure.get_size_inches()
    side = (width - 0.24 - 0.08 * (columns - 1)) / columns
    for index, (weights, label) in enumerate(zip(filters, labels, strict=True)):
        left = 0.12 + index % columns * (side + 0.08)
        bottom = height - 0.68 - (index // columns) * (side + LABEL) - side
        axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
        axes.imshow(filter_image(weights), interpolation="nearest")
        bare(axes)
        axes.set_xlabel(label, fontsize=7, labelpad=2)
