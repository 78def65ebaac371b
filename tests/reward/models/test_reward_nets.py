"""Rewards over windows: how they are cut and combined."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from tests.reward.cli_runs import parameters


def test_windows_are_cut_as_said():
    x, t = jax.random.normal(jax.random.key(4), (2, 6, 3)), jnp.array([1, 4])
    net: Any = WindowMLP(2, (8,), 8)
    params = parameters(net, x.shape[1:], 0)

    def run(net, x) -> Any:
        return net.apply({"params": params}, x, t)

    one: Any = WindowMLP(None, (8,), 8)
    by_hand = sum(run(one, x[:, i : i + 2]) for i in (0, 2, 4))
    np.testing.assert_allclose(run(net, x), by_hand, atol=1e-5)
    strided = sum(run(one, x[:, i::3]) for i in range(3))
    np.testing.assert_allclose(run(net.clone(cut="strided"), x), strided, atol=1e-5)
    np.testing.assert_allclose(run(net.clone(reduce="mean"), x), by_hand / 3, atol=1e-5)
    with pytest.raises(InputError, match="window 4 does not divide the horizon 6"):
        WindowMLP(4).init(jax.random.key(0), x, t)


def test_a_reward_is_one_number_a_row():
    x, t = jnp.zeros((3, 8, 4)), jnp.zeros(3, jnp.int32)
    for net in (WindowMLP(None, (4,), 8), WindowMLP(4, (4,), 8), HalfUnet(8, (2, 4))):
        made = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t)[0]
        assert made.shape == (3,) and made.dtype == jnp.float32
