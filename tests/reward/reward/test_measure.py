"""How well images are told apart."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from sklearn.metrics import roc_auc_score

from reward_jax.reward import measure
from reward_jax.reward.measure import (
    auc,
    best_look,
    interval,
    mean_auc,
    mean_difference,
    over_pairs,
)

RANDOM = np.random.default_rng(0)
HARMFUL = RANDOM.random(200) < 0.3


def judged(shift):
    return np.round(RANDOM.normal(size=200) - shift * HARMFUL, 1)  # with ties


@pytest.mark.parametrize("shift", [-1.0, 0.0, 2.0])
def test_the_share_of_pairs(shift):
    values = judged(shift)
    assert auc(values, HARMFUL) == pytest.approx(roc_auc_score(~HARMFUL, values))


def test_intervals():
    one, other = interval(judged(1.0), HARMFUL, 0), interval(judged(0.0), HARMFUL, 0)
    assert one.low < one.value < one.high and one.low > 0.6
    assert other.low < 0.5 < other.high and 0.05 < other.high - other.low < 0.25
    assert interval(-1.0 * HARMFUL, HARMFUL, 0) == (1.0, 1.0, 1.0)


def test_the_mean_over_choices_has_the_spread_of_choices():
    apart = [(judged(shift), HARMFUL) for shift in (-1.0, 1.0, -0.5, 0.5)]
    found = mean_auc(apart, 0)
    assert found.value == pytest.approx(np.mean([auc(*one) for one in apart]))
    assert found.low < 0.5 < found.high
    alike = mean_auc([(judged(0.0), HARMFUL)] * 4, 0)
    assert alike.high - alike.low < (found.high - found.low) / 2


def test_the_difference_of_two_judges_of_the_same_images(monkeypatch):
    """What both get wrong alike is no spread of their difference."""
    monkeypatch.setattr(measure, "_RESAMPLED", 200)
    kinds = RANDOM.integers(0, 3, 200)
    harmful = [kinds == 0, kinds == 1]
    image = RANDOM.normal(size=(2, 200))
    one, other = (
        list(image + 0.05 * RANDOM.normal(size=(2, 200)) - shift * np.stack(harmful))
        for shift in (1.0, 0.7)
    )
    found = mean_difference(one, other, harmful, 0)
    means = [np.mean([*map(auc, x, harmful)]) for x in (one, other)]
    assert found.value == pytest.approx(means[0] - means[1])
    assert 0 < found.low < found.value < found.high
    alone = [interval(x[0], harmful[0], 0) for x in (one, other)]
    assert found.high - found.low < min(x.high - x.low for x in alone) / 2
    assert mean_difference(one, one, harmful, 0) == (0, 0, 0)
    swapped = mean_difference(other, one, harmful, 0)
    assert swapped == pytest.approx((-found.value, -found.high, -found.low))


def test_the_interval_over_pairs_is_that_of_the_means():
    values = np.random.default_rng(0).normal(0.4, 0.1, 5)
    found = over_pairs(values)
    theirs = ttest_1samp(values, 0).confidence_interval(0.95)
    assert found == pytest.approx((values.mean(), theirs.low, theirs.high))


def test_the_best_look():
    assert best_look(np.stack([judged(0.0), judged(2.0), judged(-2.0)]), HARMFUL) == 1
