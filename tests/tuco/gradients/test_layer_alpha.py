"""Alphas by layer: gradients, a known answer, folds that are held out, bad questions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco import random_models as rm
from tuco_jax.core.decompose import decompose
from tuco_jax.core.places import last_column
from tuco_jax.gradients.layer_alpha import (
    Choices,
    LayerAlphaOptions,
    cross_validate_layer_alpha,
    fit_layer_alpha,
    option_log_probs,
)

log_probs = jax.jit(option_log_probs)


@functools.cache
def pair():
    return rm.adapter_pair()


@functools.cache
def choices(rows: int = 12) -> Choices:
    """Questions whose answers are those of the model at alphas of .5, 1 and 1.6 by layer."""
    tokens, mask = rm.batch(rows=rows, length=7)
    rng = np.random.default_rng(3)
    options = jnp.asarray([rng.permutation(61)[:4] for _ in range(rows)])
    asked = Choices(tokens, mask, options, jnp.zeros(rows, int))
    found = log_probs(pair(), asked, jnp.asarray([[0.5], [1.0], [1.6]]))
    return asked._replace(answers=found.argmax(axis=1))


def test_log_probs_are_those_of_the_decomposition_s_logits():
    asked, alpha = choices(), jnp.asarray([[0.7], [1.2], [0.9]])
    out = jax.jit(lambda p, t, m, a: decompose(p, t, m, a, logits=True))(
        pair(), asked.tokens, asked.mask, alpha
    )
    assert out.logits is not None
    last = out.logits[jnp.arange(12), last_column(asked.mask)]
    expected = jnp.take_along_axis(jax.nn.log_softmax(last), asked.options, axis=1)
    np.testing.assert_allclose(log_probs(pair(), asked, alpha), expected, atol=1e-4)


def test_gradient_is_that_of_finite_differences():
    asked, model = choices(), pair()

    @jax.jit
    def loss(alpha):
        return -option_log_probs(model, asked, alpha[:, None])[:, 0].mean()

    alpha = jnp.asarray([0.9, 1.1, 1.0])
    slope = jax.grad(loss)(alpha)
    for layer in range(3):
        step = 0.01 * jnp.eye(3)[layer]
        expected = float(loss(alpha + step) - loss(alpha - step)) / 0.02
        assert float(slope[layer]) == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_loss_falls_and_the_penalty_holds_alpha_near_one():
    free, history = fit_layer_alpha(pair(), choices(), LayerAlphaOptions(8, 0.1, 0.0))
    assert history[-1] < history[0] - 0.05
    held, _ = fit_layer_alpha(pair(), choices(), LayerAlphaOptions(8, 0.1, 100.0))
    assert np.abs(held - 1).max() < 0.2 * np.abs(free - 1).max()


def test_weights_leave_questions_out():
    asked, options = choices(), LayerAlphaOptions(8, 0.05, 0.0)
    weights = (jnp.arange(12) < 6).astype(jnp.float32)
    got, _ = fit_layer_alpha(pair(), asked, options, weights=weights)
    spoilt = asked._replace(answers=jnp.where(weights > 0, asked.answers, 3 - asked.answers))
    same, _ = fit_layer_alpha(pair(), spoilt, options, weights=weights)
    np.testing.assert_array_equal(got, same)
    whole, _ = fit_layer_alpha(pair(), spoilt, options)
    assert np.abs(whole - got).max() > 1e-3


def test_folds_are_judged_on_what_they_have_not_seen():
    asked, options = choices(), LayerAlphaOptions(8, 0.05, 0.0)
    found = cross_validate_layer_alpha(pair(), asked, options, grid=(0.8, 1.0), folds=2)
    assert sorted(np.bincount(found.fold)) == [6, 6]
    for f in range(2):
        weights = jnp.asarray(found.fold != f, jnp.float32)
        alpha, _ = fit_layer_alpha(pair(), asked, options, weights=weights)
        np.testing.assert_allclose(found.alphas[f], alpha, atol=1e-6)
        by_alpha = {
            a: np.asarray(
                -jnp.take_along_axis(
                    log_probs(pair(), asked, jnp.full((3, 1), a)), asked.answers[:, None], axis=1
                )
            )[:, 0]
            for a in (0.8, 1.0)
        }
        best = min(by_alpha, key=lambda a: by_alpha[a][found.fold != f].mean())
        assert found.grid[f] == pytest.approx(best)
        apart = found.fold == f
        np.testing.assert_allclose(found.losses["grid"][apart], by_alpha[best][apart], atol=1e-4)
        own = log_probs(pair(), asked, alpha[:, None])
        expected = np.asarray(own.argmax(axis=1) == asked.answers)
        np.testing.assert_array_equal(found.hits["learned"][apart], expected[apart])
    np.testing.assert_allclose(found.losses["one"], by_alpha[1.0], atol=1e-4)


def test_bad_input_is_named():
    asked = choices()
    for changes, message in (
        (dict(answers=asked.answers.at[2].set(4)), "question 3: answer 4 is outside its 4"),
        (
            dict(options=asked.options.at[1, 0].set(asked.options[1, 2])),
            "question 2: two options begin with one token",
        ),
        (dict(options=asked.options.at[4, 1].set(61)), "question 5: an option's token is beyond"),
        (dict(options=asked.options[:, :1]), r"options: give \[N, O\] tokens, two or more"),
        (dict(mask=asked.mask[:5]), r"tokens and mask: give \[N, T\] each"),
        (dict(mask=asked.mask.at[0].set(False)), "question 1: has no token; leave it out"),
    ):
        with pytest.raises(InputError, match=message):
            fit_layer_alpha(pair(), asked._replace(**changes))
    with pytest.raises(InputError, match="weights: give one a question, above 0 in sum"):
        fit_layer_alpha(pair(), asked, weights=jnp.zeros(12))
    for folds, message in ((1, "must be 2 or more, not 1"), (13, "is 13: give 12 at most for 12")):
        with pytest.raises(InputError, match=f"folds {message}"):
            cross_validate_layer_alpha(pair(), asked, folds=folds)
    with pytest.raises(InputError, match="grid holds no alpha"):
        cross_validate_layer_alpha(pair(), asked, grid=())
    for fields, message in (
        ((0, 0.1, 1.0), "steps must be 1 or more, not 0"),
        ((1, 0.0, 1.0), "learning_rate must be above 0, not 0"),
        ((1, 0.1, -1.0), "penalty must be 0 or more, not -1"),
    ):
        with pytest.raises(InputError, match=message):
            LayerAlphaOptions(*fields)
