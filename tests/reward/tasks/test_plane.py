"""Heat maps: known averages, winsorising, least counts, the peak."""

import matplotlib.figure
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.tasks.plane import LEAST, draw_map, heat_map

EXTENT = (-1.0, 1.0, -0.5, 0.5)  # two cells beside each other


def at(x, y, times):
    return np.tile(np.array([[x, y]], float), (times, 1))[:, None]  # [times, 1, 2]


def test_a_known_map():
    """Three bins: averages 0, 1 and their mean, row 0 at the bottom."""
    places = np.concatenate([at(-0.75, -0.25, 10), at(0.75, 0.25, 10), at(0.25, -0.25, 10)])
    scores = np.concatenate([np.full(10, 3.0), np.full(10, 7.0), np.full(5, 3.0), np.full(5, 7.0)])
    found = heat_map(places, scores, EXTENT, bins=2)
    assert found.values.shape == (2, 4) and found.extent == EXTENT
    expected = np.full((2, 4), np.nan)
    expected[0, 0], expected[1, 3], expected[0, 2] = 0, 1, 0.5
    np.testing.assert_allclose(found.values, expected)
    np.testing.assert_array_equal(found.counts, np.where(np.isnan(expected), 0, 10))
    np.testing.assert_allclose(found.peak, [0.75, 0.25])


def test_against_a_loop():
    rng = np.random.default_rng(0)
    places, scores = rng.uniform(-1, 1, (400, 5, 2)) * [1, 0.5], rng.normal(size=400)
    found = heat_map(places, scores, EXTENT, bins=4)
    low, high = np.quantile(scores, 0.005), np.quantile(scores, 0.995)
    sums, counts = np.zeros((4, 8)), np.zeros((4, 8), int)
    for window, score in zip(places, scores, strict=True):
        for x, y in window:
            row, column = int((y + 0.5) * 4), int((x + 1) * 4)
            counts[row, column] += 1
            sums[row, column] += (min(max(score, low), high) - low) / (high - low)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.values, sums / counts, rtol=1e-6)


def test_outliers_are_winsorised():
    rng = np.random.default_rng(1)
    places, scores = rng.uniform(-0.5, 0.5, (1000, 1, 2)), rng.uniform(size=1000)
    scores[0] = 1e9
    values = heat_map(places, scores, EXTENT, bins=2).values
    assert 0.4 < np.nanmin(values) and np.nanmax(values) < 0.6


def test_bins_with_few_visits_are_blank_and_never_the_peak():
    places = np.concatenate([at(-0.75, -0.25, LEAST), at(0.75, 0.25, LEAST - 1)])
    scores = np.concatenate([np.zeros(LEAST), np.ones(LEAST - 1)])
    found = heat_map(places, scores, EXTENT, bins=2)
    assert np.isnan(found.values[1, 3]) and found.counts[1, 3] == LEAST - 1
    assert np.isfinite(found.values).sum() == 1
    np.testing.assert_allclose(found.peak, [-0.75, -0.25])


def test_too_few_positions_for_any_bin_are_refused():
    with pytest.raises(InputError, match="no bin of the map holds 5 positions: take more"):
        heat_map(at(0.1, 0.1, 4), np.arange(4.0), EXTENT, bins=2)


def test_positions_off_the_map_and_equal_scores():
    places = np.concatenate([at(-9, -9, 6), at(9, 9, 6)])
    found = heat_map(places, np.full(12, 2.5), EXTENT, bins=2)
    assert found.counts[0, 0] == found.counts[1, 3] == 6
    np.testing.assert_array_equal(found.values[[0, 1], [0, 3]], [0, 0])


def test_cells_of_another_size():
    extent = (0.0, 4.0, 0.0, 2.0)
    found = heat_map(at(3.9, 0.1, 5), np.arange(5.0), extent, bins=3, cell=2.0)
    assert found.values.shape == (3, 6)
    np.testing.assert_allclose(found.peak, [11 / 3, 1 / 3])


def test_drawn_with_peak_and_goal():
    found = heat_map(at(-0.75, -0.25, 9), np.arange(9.0), EXTENT, bins=2)
    axes = matplotlib.figure.Figure().subplots()
    image = draw_map(axes, found, goal=(0.5, 0.0))
    assert tuple(image.get_extent()) == EXTENT and image.origin == "lower"
    marks = {
        line.get_label(): np.asarray(line.get_xydata())[0].tolist() for line in axes.get_lines()
    }
    assert marks == {"peak": [-0.75, -0.25], "goal": [0.5, 0.0]}
