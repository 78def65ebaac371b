"""Which scales a sweep tries."""

import numpy as np
import pytest

from reward_jax.studies.sweep import sweep


def tried(scales, value, failed=()):
    """The scales that are tried, where the best is that of the highest value."""
    found = []

    def best():
        lived = [scale for scale in found if scale not in failed]
        return max(lived, key=value, default=None)

    sweep(scales, found.append, best)
    return found


@pytest.mark.parametrize(
    ("peak", "beyond"),
    [
        (1.0, []),
        (2.5, [4.0]),
        (3.1, [4.0, 8.0]),
        (0.4, [0.25]),
        (0.01, [0.25, 0.125, 0.0625, 0.03125]),
        (1e9, [4.0, 8.0, 16.0, 32.0]),
    ],
)
def test_on_while_the_best_is_at_an_edge(peak, beyond):
    def value(scale):
        return -abs(np.log(scale / peak))

    assert tried((0.5, 1.0, 2.0), value) == [0.5, 1.0, 2.0, *beyond]
    assert tried((2, 1, 0.5), value) == [2.0, 1.0, 0.5, *beyond]


def test_the_next_is_as_far_as_the_edge_is_from_its_neighbour():
    assert tried((1.0, 2.0, 3.0), lambda scale: min(scale, 5.0)) == pytest.approx(
        [1.0, 2.0, 3.0, 4.5, 6.75, 10.125]
    )


def test_where_there_is_no_next():
    assert tried((4.0,), float) == [4.0]
    assert tried((4.0, 4.0), float) == [4.0, 4.0]
    assert tried((0.0, 1.0, 2.0), lambda scale: -scale) == [0.0, 1.0, 2.0]
    assert tried((1.0, 2.0), float, failed=(1.0, 2.0)) == [1.0, 2.0]
    assert tried((1.0, 2.0, 4.0), float, failed=(4.0,)) == [1.0, 2.0, 4.0]  # 2 is no edge
