"""Figures are self-contained, and the same for the same data."""

import base64

import matplotlib

from common_jax.report.figures import PALETTE, draw


def test_the_same_figure_gives_the_same_bytes_and_no_style_is_left():
    before = matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.grid"]

    def paint(axis):
        axis.plot([0, 1], [1, 0], color=PALETTE[0])
        axis.set(title="a < b", xlabel="x")

    one, two = draw(paint), draw(paint)
    assert one == two and one.startswith("data:image/svg+xml;base64,")
    text = base64.b64decode(one.partition(",")[2]).decode()
    assert text.lstrip().startswith("<?xml") and "<svg" in text and PALETTE[0] in text
    assert (matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.grid"]) == before


def test_several_axes():
    shapes = []
    draw(lambda axes: shapes.append(axes.shape), rows=2, columns=3)
    assert shapes == [(2, 3)]
