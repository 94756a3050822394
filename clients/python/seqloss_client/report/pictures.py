"""The pictures of a report, as PNG."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

_DOTS_PER_INCH = 150
_BLUE = "#1f5fa8"


def histogram(counts: NDArray[np.int64], edges: NDArray[np.float64], axis_label: str) -> bytes:
    """Bars of pairs.

    Args:
        counts: how many pairs each bar stands for.  Shape: (bars,).
        edges: where the bars begin and end.  Shape: (bars + 1,).
        axis_label: what is below the picture.
    """
    figure = _new_figure(7.5, 3.4)
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True, color=_BLUE)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(axis_label)
    axes.set_ylabel("pairs")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def density(counts: NDArray[np.int64], limit: float, labels: tuple[str, str]) -> bytes:
    """A map of how many pairs have which two losses.

    Args:
        counts: pairs; the first axis goes right, the second one up.  Shape: (cells, cells).
        limit: where both axes end.
        labels: what is below the picture and beside it.
    """
    figure = _new_figure(6.2, 5.2)
    axes = figure.add_subplot()
    image = axes.imshow(
        np.ma.masked_equal(counts.T, 0),
        origin="lower",
        extent=(0, limit, 0, limit),
        cmap="Blues",
        # From below 1, which would be white otherwise.
        norm=LogNorm(0.2, max(2, int(counts.max(initial=0)))),
        interpolation="nearest",
    )
    axes.plot([0, limit], [0, limit], color="#888888", linewidth=0.8, linestyle="--")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    figure.colorbar(image, label="pairs in a cell, logarithmic")
    return _png(figure)


def _new_figure(width: float, height: float) -> Figure:
    """Inches, with labels inside."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the metadata, the same data gives the same bytes with every version of Matplotlib.
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
