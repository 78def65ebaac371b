"""The same contrast under simpler scores, and how much stronger TuCo is."""

import numpy as np
import pytest

from tuco_jax.evaluation.contrasts import Sample
from tuco_jax.evaluation.simpler_scores import simpler_table, under_each_score


def samples(count=40):
    rng = np.random.default_rng(0)
    low, high = rng.normal(size=(2, count))
    return {
        "TuCo": (Sample("attacked", high + 2), Sample("bare", low)),
        "prompt length": (Sample("attacked", low), Sample("bare", rng.normal(size=count))),
    }


def test_each_score_has_a_row_and_its_gap():
    tuco, length = under_each_score(samples())
    assert tuco.gap is None and length.gap is not None
    assert tuco.compared.auc is not None and length.compared.auc is not None
    strength = [abs(auc.value - 0.5) for auc in (tuco.compared.auc, length.compared.auc)]
    assert length.gap.value == pytest.approx(strength[0] - strength[1])
    assert length.gap.low > 0  # TuCo tells them apart better, and chance does not explain it
    table = simpler_table([[tuco, length]])
    assert [row[:2] for row in table.rows] == [
        ["attacked > bare", "TuCo"],
        ["attacked > bare", "prompt length"],
    ]


def test_an_empty_group_has_no_rows_and_a_small_one_no_verdict():
    few = samples(3)
    assert "too few to say" in simpler_table([under_each_score(few)]).rows[0][3]
    none = {name: (first, Sample("bare", np.empty(0))) for name, (first, _) in few.items()}
    assert under_each_score(none) == []
