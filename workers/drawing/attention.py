"""Mean attention distance by layer and head (paper, figure 7 right), and attention rollout over images (figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from workers.data.source import UNKNOWN_LABEL
from workers.drawing.canvas import BLUE, INK, ORANGE, QUIET, Drawing, Floats, bare, below_title, new_figure

OUTLINE = 96.0
"""The brightness along which an image's outline is drawn over its rollout, of 255."""


def draw_attention_distance(
    distances: Floats, deviations: Floats, *, num_images: int, image_hw: tuple[int, int], uniform: float
) -> Drawing:
    """`distances` in pixels, (L, H), averaged over images, and their standard deviations among images; `uniform`: that
    of a head that attends to all patches alike."""
    layers, heads = distances.shape
    width, height = 6.4, 4.2
    title = "Mean attention distance"
    many = f"{num_images} image{'s' if num_images > 1 else ''}"
    figure = new_figure(
        width, height, title, f"{layers} layers of {heads} heads, over {many} of {image_hw[0]} x {image_hw[1]} pixels"
    )
    axes = figure.add_axes((0.65 / width, 0.5 / height, 1 - 0.85 / width, below_title(height) - 0.58 / height))
    depth = np.arange(1, layers + 1)
    # Heads beside one another, so that equal ones stay visible.
    beside = np.linspace(-0.14, 0.14, heads) if heads > 1 else np.zeros(1)
    axes.axhline(uniform, color=ORANGE, linestyle=(0, (5, 3)), linewidth=1.2, label="attention to all patches alike")
    axes.plot(depth, distances.mean(axis=1), color=INK, linewidth=1.2, alpha=0.6, label="mean of the heads")
    axes.scatter(
        (depth[:, None] + beside[None, :]).ravel(),
        np.sort(distances, axis=1).ravel(),
        s=22,
        color=BLUE,
        alpha=0.85,
        edgecolors="white",
        linewidths=0.5,
        label="a head",
        zorder=3,
    )
    axes.set_xlabel("Layer")
    axes.set_ylabel("Mean attention distance (pixels)")
    axes.set_xlim(0.5, layers + 0.5)
    # One scale for all models of one grid, unless a head looks farther.
    axes.set_ylim(0, max(1.5 * uniform, 1.15 * float(distances.max()), 1.0))
    axes.set_xticks(depth if layers <= 16 else depth[::2])
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", ncols=3, columnspacing=1.5, handletextpad=0.6)
    numbers: dict[str, NDArray[Any]] = {
        "distance": distances,
        "deviation": deviations,
        "uniform": np.array(uniform),
        "num_images": np.array(num_images),
    }
    return Drawing("attention_distance", title, _distance_caption(distances, uniform, many), figure, numbers)


def _distance_caption(distances: Floats, uniform: float, many: str) -> str:
    def layer(number: int) -> str:
        row = distances[number - 1]
        return f"in layer {number} the heads look {row.min():.1f} to {row.max():.1f} pixels far"

    last = f"; {layer(len(distances))}" if len(distances) > 1 else ""
    return f"Averaged over {many}, {layer(1)}{last}. Attention to all patches alike would be {uniform:.1f} pixels."


def draw_attention_rollout(
    images: NDArray[np.uint8],
    plain: Floats,
    residual: Floats,
    *,
    sample_ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    class_names: Sequence[str] | None,
) -> Drawing:
    """`images` (n, channels, height, width) above their rollouts (n, rows, columns), each of which sums to 1."""
    count = len(images)
    patches = plain.shape[1] * plain.shape[2]
    maps = [plain * patches, residual * patches]  # 1: as much as every patch gets where all get the same
    tile = 1.05 if count > 4 else 1.3
    width = max(1.25 + tile * count + 0.85, 5.2)
    height = 0.62 + 0.25 + 3 * tile * images.shape[2] / images.shape[3] + 0.35
    title = "Attention rollout"
    figure = new_figure(width, height, title, "Attention from the output to the image through all layers")
    grid = figure.add_gridspec(
        3,
        count,
        left=1.2 / width,
        right=(1.2 + tile * count) / width,
        bottom=0.12 / height,
        top=below_title(height) - 0.25 / height,
        wspace=0.06,
        hspace=0.06,
    )
    most = float(np.quantile(np.stack(maps), 0.985))  # a few patches take so much that the others would look alike
    for column, picture in enumerate(images.transpose(0, 2, 3, 1)):
        rows = [figure.add_subplot(grid[row, column]) for row in range(3)]
        rows[0].imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        rows[0].set_title(_name(labels[column], predicted[column], class_names), fontsize=6.5, color=INK, pad=3)
        for axes, found in zip(rows[1:], maps, strict=True):
            drawn = _draw_map(axes, found[column], picture, most)
        for axes, name in zip(rows, ("image", "attention\nonly", "with the\nresidual"), strict=True):
            bare(axes)
            if column == 0:
                axes.set_ylabel(name, fontsize=8.5, rotation=0, ha="right", va="center", labelpad=6)
    bottom, tall = 0.12 / height, (height - 0.62 - 0.25 - 0.12) / height
    beside = (1.2 + tile * count + 0.12) / width
    bar = figure.colorbar(drawn, cax=figure.add_axes((beside, bottom, 0.11 / width, tall * 2 / 3)), extend="max")
    bar.set_label("Times an equal share", fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, colors=QUIET)
    caption = (
        f"Attention rollout over {count} image{'s' if count > 1 else ''}. The most attended patch of an image gets on "
        f"average {_top(maps[0]):.1f} times an equal share by attention alone, and {_top(maps[1]):.1f} times with the "
        "residual connections taken into account."
    )
    numbers: dict[str, NDArray[Any]] = {
        "images": images,
        "rollout": plain,
        "rollout_residual": residual,
        "sample_ids": sample_ids,
        "labels": labels,
        "predicted": predicted,
    }
    return Drawing("attention_rollout", title, caption, figure, numbers)


def _draw_map(axes: Axes, found: Floats, picture: NDArray[np.uint8], most: float) -> AxesImage:
    """A rollout (rows, columns), with the outline of the image (height, width, channels) it belongs to."""
    box = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
    drawn = axes.imshow(found, cmap="cividis", vmin=0.0, vmax=most, interpolation="nearest", extent=box)
    brightness = picture.mean(axis=2)
    if brightness.min() < OUTLINE < brightness.max():
        axes.contour(brightness, levels=[OUTLINE], colors="white", linewidths=0.6, alpha=0.7)
    return drawn


def _top(maps: Floats) -> float:
    return float(maps.max(axis=(1, 2)).mean())


def _name(label: int, predicted: int, class_names: Sequence[str] | None) -> str:
    """What the image is, and what the model takes it for if that is something else."""
    if class_names is None:
        return ""
    if label == UNKNOWN_LABEL:
        return f"seen as\n{class_names[predicted]}"
    name, taken = class_names[label], class_names[predicted]
    return name if label == predicted else f"{name},\nseen as {taken}"
