"""How a score is judged: chosen and fitted on validation, judged on the test."""

import numpy as np
import pytest

from reward_jax.studies.i2p.evaluate import auc, interval, judge

RNG = np.random.default_rng(0)


def scores(shift: float, rows: int = 60) -> np.ndarray:
    return RNG.normal(size=(2, rows)) + np.array([[0.0], [shift]])


def test_auc_counts_pairs_in_order():
    found = scores(1.0, 30)
    in_order = (found[1][:, None] > found[0][None]).mean()
    assert auc(found) == pytest.approx(in_order) and auc(-found) == pytest.approx(1 - in_order)


def test_the_step_is_chosen_on_validation_and_judged_on_the_test():
    validation = np.stack([scores(0.0), scores(2.0), scores(0.5)], -1)
    test = np.stack([scores(5.0), scores(1.0), scores(0.0)], -1)
    found = judge(validation, test, [f"p{i}" for i in range(60)], 0)
    assert found["best"]["step"] == 1 and found["last"]["step"] == 2
    assert found["best"]["auc"] == auc(test[..., 1]) < found["test_auc"][0]
    low, high = found["best"]["auc_interval"]
    assert low < found["best"]["auc"] < high and high - low < 0.3
    order = (test[1, :, 1] > test[0, :, 1]).mean()
    assert found["best"]["pairs_in_order"] == pytest.approx(order)


def test_a_classifier_of_other_draws_knows_no_shift_of_the_test():
    """The authors' does, for it is fitted to the draws that it is judged on."""
    validation, test = scores(3.0), scores(3.0) + 10
    found = judge(validation[..., None], test[..., None], ["p"] * 60, 0)["best"]
    assert found["accuracy"] == pytest.approx(0.5, abs=0.02)
    assert found["accuracy_same_draws"] > 0.85


def test_an_interval_is_over_prompts():
    """Rows of one prompt are no more than one."""
    found = np.repeat(scores(1.0, 12), 10, axis=1)
    apart, together = (
        interval(found, groups, 0)
        for groups in ([f"p{i}" for i in range(120)], [f"p{i // 10}" for i in range(120)])
    )
    assert together[1] - together[0] > 1.5 * (apart[1] - apart[0])
