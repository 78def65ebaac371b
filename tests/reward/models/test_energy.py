"""Differences of energies: against their formula, and against Gaussians of which all is known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.process import FirstState, convert
from reward_jax.diffusion.schedule import cosine_schedule, from_betas, linear_schedule
from reward_jax.models.energy import energy_of
from reward_jax.models.temporal.mlp import ResidualMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.reward.relative import RelativeReward, reward_gradient

T = 8
SCHEDULE = cosine_schedule(T)


def denoiser(model, seed, prediction, **changes):
    x, t = jnp.zeros((1, 4, 5)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, drawn)
    return score_from(model, params, prediction, SCHEDULE, **changes)


@pytest.mark.parametrize("actions", [None, 2])
def test_it_is_the_formula(actions):
    base = denoiser(TemporalUnet(5, 8, (1, 2)), 1, "x0")
    expert = denoiser(ResidualMLP(12, 1, 8), 2, "v")
    network, params = energy_of(base, expert, actions=actions)
    x = jax.random.normal(jax.random.key(3), (6, 4, 5))
    t = jnp.array([0, 1, 3, 5, 6, 7])
    made: Any = network.apply({"params": params}, x, t)
    bar = np.asarray(SCHEDULE.alphas_cumprod, np.float64)[np.asarray(t)][:, None, None]
    total = []
    for one in (base, expert):
        away = np.asarray(x, np.float64) - np.sqrt(bar) * np.asarray(one.x0(x, t), np.float64)
        if actions is not None:
            away[:, 0, actions:] = 0
        total.append((away**2 / (2 * (1 - bar))).sum(axis=(1, 2)))
    np.testing.assert_allclose(made, total[0] - total[1], rtol=2e-4, atol=1e-3)


def test_pinned_entries_have_no_gradient_of_their_own_output():
    """What a denoiser says of pinned entries is untrained, and must not matter."""

    class Wrong(nn.Module):
        """Right but for the pinned entries, which it gives as a parameter says."""

        @nn.compact
        def __call__(self, x, t):
            wrong = self.param("wrong", nn.initializers.normal(), (3,))
            return 0.5 * x + jnp.zeros_like(x).at[:, 0, 2:].set(
                100 * wrong[None] + x[:, 0, 2:] ** 2
            )

    x = jax.random.normal(jax.random.key(3), (3, 4, 5))
    t = jnp.array([0, 3, 7])
    found = []
    for seed in (1, 2):
        expert = denoiser(Wrong(), seed, "x0")
        base = denoiser(ResidualMLP(12, 1, 8), 2, "v")
        network, params = energy_of(base, expert, actions=2)
        gradient = reward_gradient(network, params, x, t)
        found.append(FirstState(2)(x).free(gradient))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_of_narrow_gaussians_it_is_the_relative_reward():
    """Data at one point each: D is constant, and the gradient the scores' difference."""

    class Point(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            point = self.param("point", nn.initializers.normal(), (5,))
            return jnp.broadcast_to(point[None, None], x.shape) + 0 * x

    base, expert = denoiser(Point(), 1, "x0"), denoiser(Point(), 2, "x0")
    network, params = energy_of(base, expert)
    guide = RelativeReward(params, SCHEDULE, network, "score")
    x = jax.random.normal(jax.random.key(3), (3, 4, 5))
    t = jnp.array([0, 3, 7])
    np.testing.assert_allclose(
        guide.gradient(x, t), expert(x, t) - base(x, t), rtol=1e-3, atol=1e-3
    )
    assert convert(SCHEDULE, base.x0(x, t), x, t, "x0", "epsilon").shape == x.shape


def test_what_is_clipped_has_the_energy_of_what_was_not():
    base, expert = (denoiser(ResidualMLP(12, 1, 8), i, "x0") for i in (1, 2))
    clipped = denoiser(ResidualMLP(12, 1, 8), 2, "x0", clip=0.1)
    for one, other in zip(energy_of(base, expert), energy_of(base, clipped), strict=True):
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), one, other))


def test_denoisers_that_have_no_energy():
    base = denoiser(ResidualMLP(12, 1, 8), 1, "x0")
    with pytest.raises(InputError, match="expert is no denoiser in the base's own coordinates"):
        energy_of(base, lambda x, t, cond=None: x)
    other = from_betas(np.asarray(linear_schedule(T).betas, np.float64), "cosine")
    with pytest.raises(InputError, match="the schedule 'cosine' of the base is not the one"):
        energy_of(base.replace(schedule=other), base)  # pyright: ignore


def test_a_denoiser_of_another_shape_is_refused():
    """Its estimate was broadcast."""

    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            return nn.Dense(1)(x)

    network, params = energy_of(denoiser(Narrow(), 1, "x0"), denoiser(Narrow(), 2, "x0"))
    with pytest.raises(InputError, match=r"a denoiser gives \[2, 4, 1\] for x_t of \[2, 4, 5\]"):
        network.apply({"params": params}, jnp.zeros((2, 4, 5)), jnp.zeros(2, jnp.int32))
