"""The style of every figure: no pyplot, no display, colours for the colour-blind, too."""

import base64
import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["PALETTE", "draw"]

# After Okabe and Ito; dark enough to carry text on white.
PALETTE = ("#0072b2", "#5f6b76", "#d55e00", "#8e44ad", "#009e73", "#b8860b")

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a939c",
    "axes.labelcolor": "#33393f",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.8,
    "xtick.color": "#5b646d",
    "ytick.color": "#5b646d",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2.0,
    "svg.hashsalt": "figure",  # the same figure gives the same bytes
}


def draw(
    paint: Callable[[Any], None],
    *,
    width: float = 4.8,
    height: float = 3.4,
    rows: int = 1,
    columns: int = 1,
    share_x: bool = False,
) -> str:
    """A figure as a data URI (SVG), for an `<img>` of a self-contained page.

    paint: draws on the Axes that it is given (an array of them where there are several). width,
    height: in inches; at the default a figure is readable at the width of a phone.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes: Axes | Any = figure.subplots(rows, columns, sharex=share_x)
        paint(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
