"""Token maps show each token's own share."""

import pytest

from tests.tuco.studies.demo_groups import save_models, shares
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import (
    Prompt,
)
from tuco_jax.studies.token_maps import token_maps
from tuco_jax.weights.load import load_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def test_token_maps_show_each_token_s_own_share(models):
    pair, tokenizer = load_pair(*models)
    prompts = [
        Prompt("chat", None, ({"role": "user", "content": "na\u00efve \u2603!"},)),
        Prompt("plain", "tea"),
    ]
    maps = token_maps(
        pair, tokenizer, [("chat", 0.0, prompts[0]), ("plain text", 0.0, prompts[1])]
    )
    for prompt, found in zip(prompts, maps, strict=True):
        (ids,) = encode(tokenizer, [prompt])
        expected = shares(pair, ids)
        # Characters of several tokens are shown as one, with the last one's value.
        assert "".join(t.text for t in found.tokens) == tokenizer.decode(ids.tolist())
        assert found.tokens[-1].tuco == pytest.approx(float(expected[-1]), abs=1e-5)
        assert found.tokens[0].tuco == pytest.approx(float(expected[0]), abs=1e-5)
    own = "".join(t.text for t in maps[0].tokens if not t.special)
    assert own == "na\u00efve \u2603!"
    assert "".join(t.text for t in maps[1].tokens if not t.special) == "tea"
