"""A block in two steps is the block at once; factors add what their product would."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tuco import random_models as rm
from tuco_jax.models.layers import Linear, Mixture, block_delta, block_keys_values, whole_block
from tuco_jax.models.positions import Positions, layer_infos


@pytest.mark.parametrize(
    "changes", [{}, dict(parallel=True), dict(pre_norm=False, post_norm=True)]
)
def test_two_steps_are_the_whole(changes):
    config = rm.config(**changes)
    weights = {"params": jax.tree.map(lambda x: x[1], rm.params(config, 0)["layers"])}
    info = jax.tree.map(lambda x: x[1], layer_infos(config))
    at = Positions.of(config, jnp.asarray([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, config.width)), jnp.float32)
    whole = whole_block(config, weights, x, at, info).total
    cache = block_keys_values(config, weights, x, at, info)
    last = jnp.asarray([[6], [2]])
    one = jnp.take_along_axis(x, last[..., None], axis=1)
    delta = block_delta(config, weights, one, cache, at.pick(last), at, info).total
    np.testing.assert_allclose(
        delta, jnp.take_along_axis(whole, last[..., None], axis=1), atol=1e-5
    )


@pytest.mark.parametrize("normed", [True, False])
def test_what_a_mixture_adds_and_that_it_follows_its_own_router(normed):
    """Against every expert at every token in NumPy; another router gives another answer."""
    config = rm.config(
        mlp_bias=False, experts=5, experts_used=2, experts_normed=normed, activation="gelu_tanh"
    )
    layer = jax.tree.map(lambda x: np.asarray(x[1]), rm.params(config, 0)["layers"]["mlp"])
    x = np.random.default_rng(0).normal(size=(2, 7, config.width)).astype(np.float32)
    found = []
    for seed in (1, 2):
        router = np.random.default_rng(seed).normal(size=(config.width, 5)).astype(np.float32)
        got: Any = Mixture(config).apply({"params": layer | {"router": {"kernel": router}}}, x)
        shares = np.exp(x @ router) / np.exp(x @ router).sum(-1, keepdims=True)
        chosen = shares >= np.sort(shares, -1)[..., -2:-1]
        weights = np.where(chosen, shares, 0)
        if normed:
            weights /= weights.sum(-1, keepdims=True)
        gate, up, down = (layer[name]["kernel"] for name in ("gate", "up", "down"))
        y = np.asarray(jax.nn.gelu(np.einsum("btd,edf->btef", x, gate), approximate=True))
        y = np.einsum("btef,efd->bted", y * np.einsum("btd,edf->btef", x, up), down)
        np.testing.assert_allclose(got, np.einsum("bted,bte->btd", y, weights), atol=1e-5)
        found.append(np.asarray(got))
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_factors_add_their_product():
    rng = np.random.default_rng(0)
    x, w, a, b = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 8), (8, 6), (8, 2), (2, 6))
    )
    ours: Any = Linear(6).apply({"params": {"kernel": w}, "lora": {"a": a, "b": b}}, x)
    np.testing.assert_allclose(ours, x @ (w + a @ b), atol=1e-4)
