"""Alpha chosen by folds: gains, and their tests of significance."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from common_jax.errors import InputError
from tuco_jax.core.alpha_grid import PAPER_GRID as ALPHAS
from tuco_jax.studies.alpha_choice import check_alphas, cross_validate, mcnemar, over_tasks
from tuco_jax.studies.alpha_tables import verdict


def test_gains_by_hand():
    """Alpha 1.1 is right throughout; 1 on two questions of three."""
    right = np.zeros((3, 30), bool)
    right[1], right[2] = np.arange(30) % 3 > 0, True
    alphas = (0.9, 1.0, 1.1)
    gain = cross_validate(right, alphas)
    assert gain.chosen == (1.1,) * 5
    assert gain.at_one == pytest.approx(2 / 3)
    assert gain.gain.value == pytest.approx(1 / 3)
    assert gain.gain.low < 1 / 3 < gain.gain.high
    assert (gain.won, gain.lost) == (10, 0)
    assert gain.p == pytest.approx(2 / 2**10)
    least = cross_validate(right, alphas, minimise=True)
    assert least.chosen == (0.9,) * 5
    assert least.gain.value == pytest.approx(-2 / 3)


def test_chosen_without_the_fold_that_judges():
    """Noise gains nothing but by chance; chosen on all questions it would."""
    rng = np.random.default_rng(0)
    held, greedy = [], []
    for _ in range(200):
        right = rng.random((len(ALPHAS), 40)) < 0.5
        held.append(cross_validate(right, ALPHAS).gain.value)
        greedy.append(right.mean(axis=1).max() - right[ALPHAS.index(1.0)].mean())
    assert abs(np.mean(held)) < 3 * np.std(held) / np.sqrt(200)
    assert np.mean(greedy) > 0.05


def test_equal_alphas_stay_at_one():
    right = np.ones((len(ALPHAS), 11), bool)
    gain = cross_validate(right, ALPHAS)
    assert gain.chosen == (1.0,) * 5
    assert gain.p == 1.0
    right[ALPHAS.index(1.0)] = False
    assert cross_validate(right, ALPHAS).chosen == (0.95,) * 5


def test_tests_of_significance():
    pairs = np.asarray([[20, 9], [3, 40]])
    assert mcnemar(9, 3) == pytest.approx(stats.binomtest(9, 12).pvalue)
    assert mcnemar(9, 3) == pytest.approx(2 * stats.binom.cdf(pairs[1, 0], 12, 0.5))
    rng = np.random.default_rng(1)
    gains = {
        str(i): cross_validate(
            rng.random((3, 25)) < np.asarray([[0.4], [0.5], [0.7]]), (0.9, 1, 2)
        )
        for i in range(9)
    }
    values = [g.gain.value for g in gains.values()]
    mean, share, p = over_tasks(gains)
    assert mean.value == pytest.approx(np.mean(values))
    assert share == np.mean(np.asarray(values) > 0)
    wanted: Any = stats.wilcoxon(values)
    assert p == pytest.approx(wanted.pvalue)
    assert verdict(gains) == ("reproduced" if mean.low > 0 else "not clear")
    assert verdict(gains, -1) != "reproduced"


def test_bad_grids():
    with pytest.raises(InputError, match="they must be finite"):
        check_alphas((1.0, float("nan")))
