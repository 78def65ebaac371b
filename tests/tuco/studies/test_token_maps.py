"""Token maps show each token's own share."""

import jax
import numpy as np
import pytest

from tests.tuco.tiny import save_tiny
from tuco_jax.core.decompose import decompose
from tuco_jax.core.residual import share
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import (
    Prompt,
)
from tuco_jax.studies.token_maps import token_maps
from tuco_jax.weights.load import load_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "base", "llama", 0, max_position_embeddings=128)
    save_tiny(folder / "tuned", "llama", 1, max_position_embeddings=128)
    return str(folder / "base"), str(folder / "tuned")


@jax.jit
def _shares(pair, tokens, mask):
    out = decompose(pair, tokens, mask)
    return share(out.ptc, out.ftc)


def shares(pair, ids: np.ndarray) -> np.ndarray:
    """TuCo of each token, from the full form on one row, padded to one shape."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : ids.size] = ids
    return np.asarray(_shares(pair, tokens, np.arange(64)[None] < ids.size))[0, : ids.size]


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
