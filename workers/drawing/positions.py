"""Similarity of position embeddings, a tile for each patch (paper, figures 7 centre and 10)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from workers.drawing.canvas import Drawing, Floats, new_figure

MOST_TILES = 16
"""Along a side; of a larger grid every second patch has a tile, or every third."""
_GAP = 1
_LEFT, _SIDE, _BESIDE, _BELOW = 0.62, 4.3, 0.25, 0.52
"""Inches: left of the tiles, their width, the space after them, and the one below."""


def draw_position_similarity(similarity: Floats, kind: str) -> Drawing:
    """`similarity` as `vit.position_similarity` gives it, (L, rows, columns, rows, columns)."""
    layers, rows, columns = similarity.shape[:3]
    shown = sorted({0, (layers - 1) // 2, layers - 1})
    walls = {layer: _wall(similarity[layer]) for layer in shown}
    pixels_tall, pixels_wide = walls[0].shape
    tall = max(_SIDE * pixels_tall / pixels_wide, 1.0)
    width = _LEFT + len(shown) * (_SIDE + _BESIDE) + 0.9
    height = 0.62 + (0.25 if layers > 1 else 0.05) + tall + _BELOW
    title = "Position-embedding similarity"
    figure = new_figure(width, height, title, _subtitle(kind, rows, columns))
    for place, layer in enumerate(shown):
        left = _LEFT + place * (_SIDE + _BESIDE)
        axes = figure.add_axes((left / width, _BELOW / height, _SIDE / width, tall / height))
        drawn = _draw_tiles(axes, walls[layer], rows, columns)
        axes.set_xlabel("Column of the patch")
        if place == 0:
            axes.set_ylabel("Row of the patch")
        if layers > 1:
            axes.set_title(f"layer {layer + 1}", fontsize=9)
    beside = figure.add_axes(((width - 0.9) / width, _BELOW / height, 0.13 / width, tall / height))
    bar = figure.colorbar(drawn, cax=beside, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.set_label("Cosine similarity")
    bar.outline.set_visible(False)
    caption = f"Cosine similarity of the position embeddings ({kind}) of a grid of {rows} x {columns} patches."
    means = [f"{value:.2f} to {others}" for others, value in alike(similarity).items()]
    if means:
        caption += f" Mean similarity of a patch: {', '.join(means)}."
    return Drawing("position_similarity", title, caption, figure, {"similarity": similarity})


def alike(similarity: Floats) -> dict[str, float]:
    """Mean similarity of a patch to the others of its row, to the others of its column and to those elsewhere, where
    there are any."""
    _, rows, columns = similarity.shape[:3]
    i, j, k, m = np.indices((rows, columns, rows, columns))
    row, column = i == k, j == m
    chosen = {
        "the others of its row": row & ~column,
        "the others of its column": column & ~row,
        "those elsewhere": ~row & ~column,
    }
    return {others: float(similarity[:, pairs].mean()) for others, pairs in chosen.items() if pairs.any()}


def _subtitle(kind: str, rows: int, columns: int) -> str:
    step = _step(rows, columns)
    which = "" if step == 1 else f" (every {step}th is shown)"
    if kind.startswith("relative"):
        return f"{kind}: offsets from each patch{which} against offset 0, {rows} x {columns} patches"
    return f"{kind}: each patch{which} against all {rows} x {columns}"


def _step(rows: int, columns: int) -> int:
    return -(-max(rows, columns) // MOST_TILES)


def _wall(similarity: Floats) -> Floats:
    """One picture of all tiles, with nothing (NaN) between them."""
    rows, columns = similarity.shape[:2]
    step = _step(rows, columns)
    tiles = similarity[::step, ::step]
    down, across = tiles.shape[:2]
    wall = np.full((down * (rows + _GAP) - _GAP, across * (columns + _GAP) - _GAP), np.nan, dtype=np.float32)
    for i, j in np.ndindex(down, across):
        top, left = i * (rows + _GAP), j * (columns + _GAP)
        wall[top : top + rows, left : left + columns] = tiles[i, j]
    return wall


def _draw_tiles(axes: Axes, wall: Floats, rows: int, columns: int) -> AxesImage:
    drawn = axes.imshow(wall, cmap="viridis", vmin=-1.0, vmax=1.0, interpolation="nearest")
    step = _step(rows, columns)
    across, down = range(0, columns, step), range(0, rows, step)
    axes.set_xticks([n * (columns + _GAP) + (columns - 1) / 2 for n in range(len(across))])
    axes.set_yticks([n * (rows + _GAP) + (rows - 1) / 2 for n in range(len(down))])
    axes.set_xticklabels([str(j + 1) for j in across])
    axes.set_yticklabels([str(i + 1) for i in down])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return drawn
