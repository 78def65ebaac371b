"""The demo's measure: each group has its own scores."""

import numpy as np
import pytest

from tests.tuco.studies.demo_groups import made_groups, save_models, shares
from tuco_jax.prompts.encode import encode
from tuco_jax.studies.demo import measure
from tuco_jax.weights.load import load_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def test_study_gives_each_group_its_own_scores(models):
    pair, tokenizer = load_pair(*models)
    groups = made_groups()
    report = measure(pair, tokenizer, groups, maps=0)
    assert not report.maps
    for group, measured in zip(groups, report.groups, strict=True):
        ids = encode(tokenizer, group.prompts())
        assert measured.tokens.tolist() == [row.size for row in ids]
        np.testing.assert_allclose(measured.tuco[2], shares(pair, ids[2])[-1], atol=1e-5)
        np.testing.assert_allclose(measured.layers[:, -1], measured.tuco, atol=1e-7)
    by_name = {g.name: g for g in report.groups}
    for contrast in report.contrasts:
        first, second = by_name[contrast.higher].tuco, by_name[contrast.lower].tuco
        wins = np.mean([(a > b) + 0.5 * (a == b) for a in first for b in second])
        assert contrast.auc.value == pytest.approx(wins)
