"""What all pictures share: how they look, how filters become tiles, and their two files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]

DPI = 150
INK, QUIET = "#222222", "#6b6b6b"
BLUE, ORANGE = "#0072B2", "#D55E00"
"""Of Okabe and Ito's palette, which people with any colour vision can tell apart."""
_STYLE: Any = {
    "font.size": 9.0,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Drawing:
    """A picture before it is written."""

    name: str
    title: str
    caption: str
    """What is to be seen, in words."""
    figure: Figure
    numbers: Mapping[str, NDArray[Any]]


def style() -> Any:
    """A context in which figures are made, and written: its settings hold for them alone."""
    return matplotlib.rc_context(_STYLE)


def new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    """A figure of so many inches; its title takes the upper 0.62 inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    left = 0.12 / width
    figure.text(left, 1 - 0.12 / height, title, fontsize=12, fontweight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.37 / height, subtitle, fontsize=8.5, color=QUIET, va="top")
    return figure


def below_title(height: float) -> float:
    """The share of a figure's height that lies below its title."""
    return 1 - 0.62 / height


def filter_image(weights: Floats) -> Floats:
    """A filter, (channels, P, P), to look at, (P, P, 3) in 0 to 1: grey is 0, its value farthest from 0 is white or
    black (of three channels: full or no colour)."""
    peak = float(np.abs(weights).max())
    image = 0.5 + 0.5 * weights / (peak if peak > 0 else 1.0)
    return np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)


def bare(axes: Axes) -> None:
    """No ticks and no frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def to_png(figure: Figure) -> bytes:
    """Bytes of a PNG; the same figure gives the same ones."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    out = io.BytesIO()
    opaque = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[:, :, :3])
    Image.fromarray(opaque).save(out, "PNG", optimize=True, dpi=(DPI, DPI))
    return out.getvalue()


def to_npz(numbers: Mapping[str, NDArray[Any]]) -> bytes:
    """Bytes of a file for `numpy.load`."""
    out = io.BytesIO()
    np.savez_compressed(out, allow_pickle=False, **numbers)
    return out.getvalue()
