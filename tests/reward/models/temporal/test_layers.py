"""Layers whose derivatives are trained on: against PyTorch's and flax's, to the second order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from common_jax.errors import InputError
from reward_jax.models.conv import MANY
from reward_jax.models.temporal.layers import GroupNorm, _attended, activation, mish


def test_mish_to_the_second_derivative():
    x = np.concatenate([np.linspace(-60, 60, 41), np.linspace(-3, 3, 13)]).astype(np.float32)
    a = torch.from_numpy(x).double().requires_grad_()
    y = torch.nn.functional.mish(a)
    first = torch.autograd.grad(y.sum(), a, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), a)[0]
    np.testing.assert_allclose(mish(jnp.asarray(x)), y.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(mish))(x), first.detach(), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(jax.grad(jax.grad(mish)))(x), second, atol=1e-5)
    with pytest.raises(InputError, match="activation 'gelu' is unknown; known are mish, silu"):
        activation("gelu")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rows", [2, MANY])
def test_group_norm_is_flax_s_twice_differentiated(rows):
    ours, theirs = (
        GroupNorm(4, method="matmul"),
        nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False),
    )
    x = 3 + jax.random.normal(jax.random.key(0), (rows, 5, 12))
    keys = jax.random.split(jax.random.key(1))
    params = {n: jax.random.normal(k, (12,)) for n, k in zip(("scale", "bias"), keys, strict=True)}

    def matched(norm, params):
        def total(x):
            return jnp.sum(jnp.sin(norm.apply({"params": params}, x)))

        return jnp.sum(jnp.cos(jax.grad(total)(x)))

    for f in (
        lambda norm, p: norm.apply({"params": p}, x),
        jax.grad(matched, argnums=1),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
            f(ours, params),
            f(theirs, params),
        )


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8])
def test_linear_attention_by_pairs_of_steps_or_by_sums(steps):
    """Few steps are summed in another order; both are the formula, in double precision."""
    rng = np.random.default_rng(steps)
    k, v, q = rng.normal(size=(3, 6, steps, 2, 7))
    wanted = np.zeros_like(q)
    for t in range(steps):
        for s in range(steps):
            wanted[:, t] += np.sum(q[:, t] * k[:, s], axis=-1, keepdims=True) * v[:, s]
    got = _attended(*(jnp.asarray(x, jnp.float32) for x in (k, v, q)))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
