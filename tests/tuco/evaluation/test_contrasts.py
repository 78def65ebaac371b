import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from tuco_jax.evaluation.contrasts import Sample, compare, contrast_table, orientation, verdict
from tuco_jax.evaluation.statistics import (
    Estimate,
    bootstrap_auc,
    bootstrap_strength_gap,
    bootstrap_tpr,
    centred_auc,
    within_auc,
)

RNG = np.random.default_rng(3)
HIGH, LOW = RNG.normal(0.5, 1, 36), RNG.normal(0, 1, 27)
FIRST, SECOND = np.arange(36) % 5, np.arange(27) % 5


def test_within_is_the_pair_weighted_mean_of_each_cluster_s_auc():
    pairs = [(HIGH[FIRST == c], LOW[SECOND == c]) for c in range(5)]
    aucs = [roc_auc_score(np.repeat([1, 0], [len(a), len(b)]), np.r_[a, b]) for a, b in pairs]
    found = within_auc(HIGH, LOW, (FIRST, SECOND))
    weights = [len(a) * len(b) for a, b in pairs]
    assert found is not None
    assert found.value == pytest.approx(np.average(aucs, weights=weights))
    assert found.low < found.value < found.high
    # Observations are resampled, too: wider than by drawing these five clusters alone.
    drawn = np.random.default_rng(0).multinomial(5, np.full(5, 0.2), size=2000)
    alone = drawn @ np.multiply(aucs, weights) / (drawn @ weights)
    low, high = np.quantile(alone, (0.025, 0.975))
    assert found.low < low and found.high > high


def test_a_pair_of_prompts_within_clusters_is_not_enough():
    """One attack held once and broke once, all others have one outcome: nothing is concluded."""
    held = Sample("held", np.linspace(0.5, 0.6, 6), np.array(list("aabbcx")))
    broke = Sample("broken", np.linspace(0.1, 0.2, 6), np.array(list("ddeefx")))
    found = compare(held, broke)
    assert found.enough and found.inside == (1, 1) and not found.enough_inside


def test_clusters_of_one_name_are_drawn_in_both_groups_at_once():
    """Scores that are their cluster's: what one cluster does to both groups cancels."""
    shift = np.repeat(np.arange(6) * 10.0, 4)
    noise = np.random.default_rng(1).normal(size=24)
    names = np.repeat(list("abcdef"), 4)
    joint = bootstrap_auc(shift + noise, shift - noise, (names, names))
    apart = bootstrap_auc(shift + noise, shift - noise, (names, np.char.add(names, "'")))
    assert joint.value == apart.value
    assert joint.high - joint.low < 0.7 * (apart.high - apart.low)


def test_a_cluster_s_shift_moves_the_pooled_auc_alone():
    shift = np.array([0, 10, 20, 30, 40.0])
    high, low = HIGH + shift[FIRST], LOW + shift[SECOND]
    clusters = FIRST, SECOND
    assert within_auc(high, low, clusters) == pytest.approx(within_auc(HIGH, LOW, clusters))
    assert centred_auc(high, low, clusters) == pytest.approx(centred_auc(HIGH, LOW, clusters))
    assert bootstrap_auc(high, low).value != pytest.approx(bootstrap_auc(HIGH, LOW).value)


def test_what_only_clusters_tell_apart_is_chance_once_their_means_are_off():
    # The first group's prompts are all in clusters 0 and 1, whose scores are the higher.
    high, low = np.full(8, 5.0), np.zeros(8)
    clusters = np.repeat([0, 1], 4), np.repeat([2, 3], 4)
    compared = compare(Sample("held", high, clusters[0]), Sample("broken", low, clusters[1]))
    assert compared.auc == (1, 1, 1)
    assert compared.within is None and compared.centred is None
    assert centred_auc(high, low, clusters).value == 0.5


def test_centred_auc_is_that_of_the_residuals():
    names = np.r_[FIRST, SECOND]
    values = np.r_[HIGH, LOW]
    rest = values - np.array([values[names == c].mean() for c in names])
    expected = roc_auc_score(np.repeat([1, 0], [36, 27]), rest)
    assert centred_auc(HIGH, LOW, (FIRST, SECOND)).value == pytest.approx(expected)


def test_one_cluster_is_resampled_by_observation():
    found = within_auc(HIGH, LOW, (np.zeros(36), np.zeros(27)))
    assert found == pytest.approx(bootstrap_auc(HIGH, LOW))
    assert centred_auc(HIGH, LOW, (np.zeros(36), np.zeros(27))) == pytest.approx(found)


@pytest.mark.parametrize("digits", [1, 8])  # with ties, and without
def test_tpr_at_a_false_positive_rate_is_scikit_learn_s(digits):
    high, low = HIGH.round(digits), LOW.round(digits)
    false, true, _ = roc_curve(np.repeat([1, 0], [36, 27]), np.r_[high, low])
    for rate in (0.05, 0.2):
        found = bootstrap_tpr(high, low, rate=rate)
        assert found.value == pytest.approx(true[false <= rate].max())
        assert found.low <= found.value <= found.high
    assert bootstrap_tpr(high, low, rate=1).value == 1


def test_the_gap_in_strength_does_not_depend_on_direction():
    noise = RNG.normal(size=36), RNG.normal(size=27)
    gap = bootstrap_strength_gap((HIGH + 2, LOW), noise)
    assert gap.low > 0
    assert bootstrap_strength_gap((-HIGH - 2, -LOW), noise) == pytest.approx(gap)
    assert bootstrap_strength_gap((HIGH, LOW), (HIGH, LOW)) == (0, 0, 0)
    back = bootstrap_strength_gap(noise, (HIGH + 2, LOW))
    assert (back.value, back.high) == pytest.approx((-gap.value, -gap.low))


def test_compare_by_low_scores_calls_the_lower_group():
    low, high = Sample("broken", LOW - 9), Sample("held", HIGH)
    assert compare(low, high, below=True).tpr == (1, 1, 1)
    assert compare(low, high).tpr == (0, 0, 0)
    assert compare(low, high, below=True).auc == (0, 0, 0)


def test_an_empty_group_is_no_auc_and_no_crash():
    found = compare(Sample("broken", LOW[:0]), Sample("held", HIGH))
    assert found.auc is None and found.tpr is None
    assert verdict(found.auc) == "not testable here"
    (row,) = contrast_table("t", [found]).cells()
    assert row == ["broken > held", "0 : 36", "-", "-", "one group is empty: no AUC"]
    few = compare(Sample("broken", LOW[:4] + 9), Sample("held", HIGH))
    (row,) = contrast_table("t", [few]).cells()
    assert row[2] == "1.000 [1.000, 1.000]" and row[-1].endswith("5 of a kind: too few to say")
    clustered = compare(Sample("a", HIGH, FIRST), Sample("b", LOW, SECOND))
    table = contrast_table("t", [found, clustered], cluster="attack")
    assert list(table.columns)[3:5] == ["AUC within attack", "AUC, attack's mean removed"]
    assert [len(row) for row in table.cells()] == [7, 7]


def test_orientation_and_verdict_go_by_the_interval():
    above, below, across = (
        Estimate(0.8, 0.7, 0.9),
        Estimate(0.2, 0.1, 0.3),
        Estimate(0.6, 0.4, 0.8),
    )
    texts = [orientation("a", "b", e) for e in (above, below, across)]
    assert texts == ["a higher", "b higher", "neither is clearly higher"]
    assert [verdict(e) for e in (above, below, across)] == [
        "reproduced",
        "not reproduced",
        "not clear",
    ]
    assert verdict(below, above=False) == "reproduced"
    assert verdict(Estimate(-0.2, -0.3, -0.1), middle=0, above=False) == "reproduced"
