"""Tokens are drawn as their settings say."""

import jax
import jax.numpy as jnp
import numpy as np

from tuco_jax.generation.sampling import Sampling, choose, row_keys

PROMPTS = [np.random.default_rng(n).integers(0, 61, n) for n in (3, 13, 1, 8, 5)]


def test_sampling_follows_the_distribution():
    logits = jnp.asarray([2.0, 0.0, 1.0, -1.0, 1.5])
    draws = 10_000
    keys = row_keys(0, jnp.arange(draws))
    many = jnp.broadcast_to(logits, (draws, 5))
    counts = jnp.zeros(draws, jnp.int32)

    def shares(**settings):
        chosen = jax.jit(choose)(many, Sampling.of(**settings), keys, counts)
        return np.bincount(np.asarray(chosen), minlength=5) / draws

    def softmax(support, temperature):
        p = np.exp(np.asarray(logits) / temperature) * np.isin(np.arange(5), support)
        return p / p.sum()

    def close(got, want):  # within five standard errors, and nothing outside the support
        assert (np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / draws)).all(), (got, want)

    close(shares(temperature=1.0), softmax([0, 1, 2, 3, 4], 1.0))
    close(shares(temperature=0.5), softmax([0, 1, 2, 3, 4], 0.5))
    close(shares(temperature=1.0, top_k=3), softmax([0, 2, 4], 1.0))
    # Shares at temperature 1: token 0 has .44, 4 has .27, 2 has .16: two reach .6, three .75.
    close(shares(temperature=1.0, top_p=0.6), softmax([0, 4], 1.0))
    close(shares(temperature=1.0, top_p=0.75), softmax([0, 2, 4], 1.0))
    close(shares(temperature=1.0, top_p=0.001), softmax([0], 1.0))
    # Of the likeliest two, the first has .62.
    close(shares(temperature=1.0, top_k=2, top_p=0.6), softmax([0], 1.0))
    close(shares(temperature=1.0, top_k=9), softmax([0, 1, 2, 3, 4], 1.0))
    sampling = Sampling.of(temperature=1.0)
    first, second = (jax.jit(choose)(many, sampling, keys, counts + n) for n in (0, 1))
    assert (first != second).mean() > 0.5
