"""A learned reward as a guide, its seeds apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.reward.extract import init_params
from reward_jax.reward.relative import RelativeReward, SeedBlocks


def test_seeds_steer_blocks_of_rows_apart():
    net = WindowMLP(None, (6,))
    params = init_params(net, jax.random.key(0), jnp.zeros((1, 3, 2)), 4)
    reward = RelativeReward(params, cosine_schedule(5), net, "posterior_mean", 4)
    x = jax.random.normal(jax.random.key(1), (8, 3, 2))
    t = jnp.arange(8) % 5
    for name in ("gradient", "learned_gradient"):
        got = getattr(SeedBlocks(reward), name)(x, t)
        for seed in range(4):
            rows = slice(2 * seed, 2 * seed + 2)
            alone = getattr(reward.seed(seed), name)(x[rows], t[rows])
            np.testing.assert_allclose(got[rows], alone, rtol=1e-5, atol=1e-6)
    for bad, rows in ((reward, 7), (reward.seed(0), 8)):
        with pytest.raises(InputError, match=rf"{rows} rows cannot be \d blocks of one seed each"):
            SeedBlocks(bad).gradient(x[:rows], t[:rows])
