"""The demo's measure: each group has its own scores."""

import jax
import numpy as np
import pytest

from tests.tuco.tiny import save_tiny
from tuco_jax.core.decompose import decompose
from tuco_jax.core.residual import share
from tuco_jax.datasets.prompt_groups import PromptGroup
from tuco_jax.prompts.encode import encode
from tuco_jax.studies.demo import measure
from tuco_jax.weights.load import load_pair

TEXTS = ["hello", "a b c", "one & two", "na\u00efve \u2603", "tea?", "<script>"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "base", "llama", 0, max_position_embeddings=128)
    save_tiny(folder / "tuned", "llama", 1, max_position_embeddings=128)
    return str(folder / "base"), str(folder / "tuned")


@pytest.fixture(scope="module")
def groups() -> list[PromptGroup]:
    names = ["x", "x", "y", "y", "z", "z"]
    inside = [f"do: {t}" for t in TEXTS]
    return [
        PromptGroup("chat", "Chat.", TEXTS, True),
        PromptGroup("plain text", "Plain.", TEXTS, False),
        PromptGroup("harmful", "Harm.", [t + "!" for t in TEXTS], True),
        PromptGroup("jailbreak", "Attack.", inside, True, names),
    ]


@jax.jit
def _shares(pair, tokens, mask):
    out = decompose(pair, tokens, mask)
    return share(out.ptc, out.ftc)


def shares(pair, ids: np.ndarray) -> np.ndarray:
    """TuCo of each token, from the full form on one row, padded to one shape."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : ids.size] = ids
    return np.asarray(_shares(pair, tokens, np.arange(64)[None] < ids.size))[0, : ids.size]


def test_study_gives_each_group_its_own_scores(models, groups):
    pair, tokenizer = load_pair(*models)
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
