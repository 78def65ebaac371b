import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tuco_jax.evaluation.statistics import (
    auc,
    bootstrap_auc,
    bootstrap_mean,
    roc,
    wilson_interval,
)

RNG = np.random.default_rng(0)
HIGH, LOW = RNG.normal(1.0, 1.0, 40), RNG.normal(0.0, 1.0, 30)


def test_auc_is_above_a_half_when_the_first_group_is_the_higher_one():
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auc(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 0.0
    assert auc(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
    assert auc(HIGH, LOW) == pytest.approx(1 - auc(LOW, HIGH))


def test_auc_agrees_with_scikit_learn():
    values = np.round(np.concatenate([HIGH, LOW]), 1)  # with ties
    labels = np.repeat([1, 0], [40, 30])
    assert auc(values[:40], values[40:]) == pytest.approx(roc_auc_score(labels, values))
    false, true = roc(values[:40], values[40:])
    assert np.trapezoid(true, false) == pytest.approx(auc(values[:40], values[40:]))


def test_bootstrap_intervals_hold_the_value_and_are_as_wide_as_theory_says():
    mean = bootstrap_mean(HIGH)
    assert mean.value == pytest.approx(HIGH.mean())
    assert mean.low < mean.value < mean.high
    assert mean.high - mean.low == pytest.approx(3.92 * HIGH.std() / 40**0.5, rel=0.1)
    estimate = bootstrap_auc(HIGH, LOW)
    assert estimate.value == auc(HIGH, LOW)
    # Hanley and McNeil's standard error of an AUC.
    a = estimate.value
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = ((a * (1 - a) + 39 * (q1 - a * a) + 29 * (q2 - a * a)) / 1200) ** 0.5
    assert estimate.high - estimate.low == pytest.approx(3.92 * error, rel=0.2)


def test_whole_clusters_are_resampled():
    values = np.repeat(RNG.normal(size=8), 5)  # five copies of each of eight
    clusters = np.repeat(np.arange(8), 5)
    naive, honest = bootstrap_mean(values), bootstrap_mean(values, clusters)
    assert naive.value == honest.value
    ratio = (honest.high - honest.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(5**0.5, rel=0.15)
    low = bootstrap_auc(values, LOW, (clusters, None))
    assert low.high - low.low > np.ptp(bootstrap_auc(values, LOW)[1:])


def test_wilson_interval():
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)
