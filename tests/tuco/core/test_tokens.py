"""Token ids outside the vocabulary are refused, and lists are as good as arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco import random_models as rm
from tuco_jax.core.alpha_grid import grid_logits
from tuco_jax.core.decompose import decompose
from tuco_jax.core.last_token import last_token, tuco
from tuco_jax.core.tokens import as_mask, as_tokens, check_row
from tuco_jax.core.trajectories import output_co, trajectories
from tuco_jax.evaluation.option_scores import option_scores
from tuco_jax.generation.generate import generate_tokens
from tuco_jax.gradients.attribution import attribute
from tuco_jax.prompts.read import Prompt
from tuco_jax.scoring.score import score_tokens
from tuco_jax.scoring.token_tuco import token_tuco

ROWS: Any = [[3, 1, 60], [7, 0, 0]]
MASK: Any = [[1, 1, 1], [1, 0, 0]]
ALPHAS: Any = [0.5]
FUNCTIONS = {
    "tuco": tuco,
    "last_token": last_token,
    "decompose": decompose,
    "trajectories": trajectories,
    "output_co": output_co,
    "grid_logits": lambda pair, tokens, mask: grid_logits(pair, tokens, mask, ALPHAS),
    "attribute": lambda pair, tokens, mask: attribute(pair, tokens, mask, points=1),
}


@pytest.fixture(scope="module")
def pair():
    return rm.full_pair(base=rm.config(depth=2, windows=(0, 5), rope_index=(0, 1)))


@pytest.mark.parametrize("bad", [-1, 61, 2**31, -(2**40)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_ids_outside_the_vocabulary(pair, name, bad):
    rows = np.asarray(ROWS)
    rows[0, 1] = bad
    given = [rows, rows.tolist()] + [jnp.asarray(rows, jnp.int32)] * (abs(bad) < 2**31)
    for tokens in given:
        message = f"tokens: token {bad} is outside the tuned model's vocabulary of 61; give padd"
        with pytest.raises(InputError, match=message):
            FUNCTIONS[name](pair, tokens, MASK)


@pytest.mark.parametrize("bad", [-100, 61, -(2**40)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_id_stands_for_padding_under_the_mask(pair, name, bad):
    """As -100, or a padding token that the models were not resized for; compiled or not."""
    padded = np.asarray(ROWS)
    padded[1, 1:] = bad
    want = FUNCTIONS[name](pair, ROWS, MASK)
    found = [FUNCTIONS[name](pair, padded, MASK)]
    if abs(bad) < 2**31:
        found.append(jax.jit(lambda t: FUNCTIONS[name](pair, t, MASK))(jnp.asarray(padded)))
    for got in found:
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            real = np.asarray(MASK, bool) if one.shape[:2] == (2, 3) else ...
            np.testing.assert_allclose(one[real], other[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tuco", "decompose"])
def test_lists_are_taken_as_arrays_are(pair, name):
    want = FUNCTIONS[name](pair, jnp.asarray(ROWS), jnp.asarray(MASK, bool))
    got = FUNCTIONS[name](pair, ROWS, MASK)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    if name == "decompose":  # without a mask all tokens are real
        assert decompose(pair, ROWS).hidden.shape == (2, 3, 24)


def test_rows_of_ids(pair):
    given: list[Any] = [[3, -1], np.array([3, 61]), jnp.asarray([3, 70])]
    for row in given:
        with pytest.raises(InputError, match=r"rows\[0\]: token .* is outside"):
            token_tuco(pair, [row])
        with pytest.raises(InputError, match=r"prompts\[0\]: token .* is outside"):
            generate_tokens(pair, [row], max_new_tokens=1)
        with pytest.raises(InputError, match="prompt 'a': token .* is outside"):
            score_tokens(pair, [row], [Prompt("a")])
        with pytest.raises(InputError, match="token .* is outside"):
            option_scores(pair, [row], np.asarray([1, 2]), ALPHAS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([3, 1], r"tokens have shape \[2\]: give \[B, T\]"),
        ([[3], [1, 2]], "tokens: rows of unequal lengths; pad them to one, and give a mask"),
        ([[3.0, 1.0]], "tokens are float64: token ids are whole numbers"),
        ([[True, False]], "tokens are bool: token ids are whole numbers"),
        ([["a"]], "tokens are <U1: token ids are whole numbers"),
    ],
)
def test_what_is_no_array_of_tokens(tokens, message):
    with pytest.raises(InputError, match=message):
        as_tokens(tokens, None, 61)


def test_masks_and_compiled_functions():
    tokens = jnp.asarray(ROWS)
    with pytest.raises(InputError, match=r"mask has shape \[1, 3\], but tokens have \[2, 3\]"):
        as_mask(MASK[:1], tokens)
    assert as_mask(None, tokens).all()
    bad = tokens.at[0, 0].set(-1)
    assert (
        jax.jit(lambda t: as_tokens(t, None, 61)[0])(bad)[0, 0] == -1
    )  # there, nothing can be said
    assert check_row([], 61, "row").dtype == np.int32
