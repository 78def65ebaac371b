"""Soft prompts: vectors that are tokens, bounds, and what they do to TuCo."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco import random_models as rm
from tuco_jax.core.last_token import tuco
from tuco_jax.gradients.soft_prompt import (
    SoftPromptOptions,
    Tokens,
    fit_soft_prompt,
    soft_prompt_tuco,
)

plain = jax.jit(tuco)
OPTIONS = SoftPromptOptions(vectors=3, steps=12, learning_rate=0.1)


@functools.cache
def prompts(seed: int = 0) -> Tokens:
    tokens, _ = rm.batch(rows=4, length=9, seed=seed)
    return Tokens(tokens, jnp.arange(9)[None] < jnp.asarray([[9], [5], [4], [7]]))


@functools.cache
def pair():
    return rm.adapter_pair(base=rm.config(embed_scale=2.0))


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True])
def test_vectors_of_tokens_are_those_tokens(learned):
    config = rm.config(embed_scale=2.0, **(dict(ropes=(), rope_index=()) if learned else {}))
    model = rm.adapter_pair(base=config)
    ids = jnp.asarray([7, 30, 2])
    vectors = 2.0 * model.base["embed"]["table"][ids]
    got = soft_prompt_tuco(model, vectors, prompts(), position=2)
    tokens, mask = prompts()
    between = jnp.broadcast_to(ids, (4, 3))
    whole = jnp.concatenate([tokens[:, :2], between, tokens[:, 2:]], axis=1)
    mask = jnp.concatenate([jnp.ones((4, 3), bool), mask], axis=1)
    np.testing.assert_allclose(got, plain(model, whole, mask), rtol=1e-4)


@pytest.mark.slow
def test_gradient_is_that_of_finite_differences():
    """By norm 2: norm 1 has a kink wherever a component changes sign."""
    vectors = jnp.asarray(np.random.default_rng(0).normal(size=(3, 24)), jnp.float32)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=(3, 24)), jnp.float32)
    model, rows = pair(), prompts()  # made outside of what is traced

    @jax.jit
    def mean(v):
        return soft_prompt_tuco(model, v, rows, norm=2).mean()

    slope = float((jax.grad(mean)(vectors) * direction).sum())
    step = 4e-3 * direction
    expected = float(mean(vectors + step) - mean(vectors - step)) / 8e-3
    assert abs(slope) > 1e-3
    assert slope == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("maximise", [False, True])
def test_tuco_moves_where_it_should(maximise):
    options = dataclasses.replace(OPTIONS, maximise=maximise)
    found = fit_soft_prompt(pair(), prompts(), options, held_out=prompts(5))
    sign = 1 if maximise else -1
    assert sign * (found.fitted.mean() - found.start.mean()) > 0.01
    assert found.history[0] == pytest.approx(found.start.mean(), rel=1e-5)
    assert found.history.shape == (12,)
    np.testing.assert_allclose(
        found.fitted, soft_prompt_tuco(pair(), found.vectors, prompts()), rtol=1e-5
    )
    np.testing.assert_allclose(found.plain, plain(pair(), *prompts()), rtol=1e-5)
    assert found.held_out is not None
    np.testing.assert_allclose(
        found.held_out[2], soft_prompt_tuco(pair(), found.vectors, prompts(5)), rtol=1e-5
    )


def test_bound_holds():
    options = dataclasses.replace(OPTIONS, max_norm=0.5)
    found = fit_soft_prompt(pair(), prompts(), options)
    size = 2.0 * np.linalg.norm(pair().base["embed"]["table"], axis=1).mean()
    norms = np.linalg.norm(found.vectors, axis=1)
    assert norms.max() == pytest.approx(0.5 * size, rel=1e-4)
    assert found.held_out is None and found.history[-1] < found.history[0]


def test_bad_input_is_named():
    for changes, message in (
        (dict(vectors=0), "vectors must be 1 or more, not 0"),
        (dict(steps=0), "steps must be 1 or more, not 0"),
        (dict(position=-1), "position must be 0 or more, not -1"),
        (dict(learning_rate=0.0), "learning_rate must be above 0, not 0"),
        (dict(max_norm=0.0), "max_norm must be above 0, not 0"),
        (dict(norm=3), "norm must be 1 or 2, not 3"),
        (dict(seed=-1), "seed must be 0 to 4294967295, not -1"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(OPTIONS, **changes)
    tokens, mask = prompts()
    long = jnp.zeros((1, 62), int), jnp.ones((1, 62), bool)
    for rows, message in (
        ((tokens, mask[:, ::-1]), "prompts: prompts must be padded on the right"),
        ((tokens, mask[:2]), r"prompts: give tokens and mask \[B, T\] of one shape"),
        (
            (tokens, mask & (jnp.arange(9)[None] < 1)),
            "a prompt of 1 tokens has none after position 1",
        ),
        (long, "prompts: 65 tokens with the vectors, but the model's context holds 64"),
    ):
        with pytest.raises(InputError, match=message):
            fit_soft_prompt(pair(), Tokens(*rows), OPTIONS)
    with pytest.raises(InputError, match="held_out: prompts must be padded on the right"):
        fit_soft_prompt(pair(), prompts(), OPTIONS, held_out=Tokens(tokens, mask[:, ::-1]))
