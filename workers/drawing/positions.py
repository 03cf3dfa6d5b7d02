"""Similarity of position embeddings, a tile for each patch (paper, figures 7 centre and 10)."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from workers.drawing.canvas import Drawing, Floats, below_title, new_figure

MOST_TILES = 16
"""Along a side; of a larger grid every second patch has a tile, or every third."""
_GAP = 1


def draw_position_similarity(similarity: Floats, kind: str) -> Drawing:
    """`similarity` as `vit.position_similarity` gives it, (L, rows, columns, rows, columns)."""
    layers, rows, columns = similarity.shape[:3]
    shown = sorted({0, (layers - 1) // 2, layers - 1})
    width = 0.9 + 4.3 * len(shown) + 0.75
    height = 0.62 + 4.3 * rows / columns + 0.65
    title = "Position-embedding similarity"
    figure = new_figure(width, height, title, _subtitle(kind, rows, columns))
    grid = figure.add_gridspec(
        1,
        len(shown) + 1,
        width_ratios=[*[4.3] * len(shown), 0.16],
        left=0.62 / width,
        right=1 - 0.7 / width,
        bottom=0.52 / height,
        top=below_title(height) - (0.15 / height if layers > 1 else 0.0),
        wspace=0.12,
    )
    for place, layer in enumerate(shown):
        axes = figure.add_subplot(grid[0, place])
        drawn = _draw_tiles(axes, similarity[layer])
        axes.set_xlabel("Column of the patch")
        if place == 0:
            axes.set_ylabel("Row of the patch")
        if layers > 1:
            axes.set_title(f"layer {layer + 1}", fontsize=9)
    bar = figure.colorbar(drawn, cax=figure.add_subplot(grid[0, len(shown)]), ticks=[-1, -0.5, 0, 0.5, 1])
    bar.set_label("Cosine similarity")
    bar.outline.set_visible(False)  # type: ignore[operator]
    same_row, same_column, elsewhere = alike(similarity)
    caption = (
        f"Cosine similarity of the position embeddings ({kind}) of a grid of {rows} x {columns} patches. On average a "
        f"patch is {same_row:.2f} similar to the others of its row, {same_column:.2f} to the others of its column, and "
        f"{elsewhere:.2f} to those elsewhere."
    )
    return Drawing("position_similarity", title, caption, figure, {"similarity": similarity})


def alike(similarity: Floats) -> tuple[float, float, float]:
    """Mean similarity of two different patches of one row, of one column, and of neither; NaN where there are none."""
    _, rows, columns = similarity.shape[:3]
    i, j, k, m = np.indices((rows, columns, rows, columns))
    row, column = i == k, j == m

    def mean(chosen: np.ndarray) -> float:
        return float(similarity[:, chosen].mean()) if chosen.any() else float("nan")

    return mean(row & ~column), mean(column & ~row), mean(~row & ~column)


def _subtitle(kind: str, rows: int, columns: int) -> str:
    step = _step(rows, columns)
    tiles = "Each tile is one patch" if step == 1 else f"Each tile is one patch, every {step}th in both directions"
    what = "its offset embeddings to that of offset 0" if kind == "relative" else "its embedding to that of every patch"
    return f"{kind}, {rows} x {columns} patches. {tiles}: the similarity of {what}."


def _step(rows: int, columns: int) -> int:
    return -(-max(rows, columns) // MOST_TILES)


def _draw_tiles(axes: Axes, similarity: Floats) -> object:
    rows, columns = similarity.shape[:2]
    step = _step(rows, columns)
    chosen_rows, chosen_columns = range(0, rows, step), range(0, columns, step)
    mosaic = np.full((len(chosen_rows) * (rows + _GAP) - _GAP, len(chosen_columns) * (columns + _GAP) - _GAP), np.nan)
    for down, i in enumerate(chosen_rows):
        for right, j in enumerate(chosen_columns):
            top, left = down * (rows + _GAP), right * (columns + _GAP)
            mosaic[top : top + rows, left : left + columns] = similarity[i, j]
    drawn = axes.imshow(mosaic, cmap="viridis", vmin=-1.0, vmax=1.0, interpolation="nearest")
    axes.set_xticks([n * (columns + _GAP) + (columns - 1) / 2 for n in range(len(chosen_columns))])
    axes.set_yticks([n * (rows + _GAP) + (rows - 1) / 2 for n in range(len(chosen_rows))])
    axes.set_xticklabels([str(j + 1) for j in chosen_columns])
    axes.set_yticklabels([str(i + 1) for i in chosen_rows])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return drawn
