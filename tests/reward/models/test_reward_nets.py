"""Rewards over windows: how they are cut and combined."""

import re
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


@pytest.mark.parametrize(
    ("net", "shape", "said"),
    [
        (WindowMLP(1, cut="odd"), (2, 6, 3), "cut must be contiguous or strided, not 'odd'"),  # pyright: ignore[reportArgumentType]
        (WindowMLP(1, reduce="max"), (2, 6, 3), "reduce must be sum or mean, not 'max'"),  # pyright: ignore[reportArgumentType]
        (WindowMLP(1, head="x"), (2, 6, 3), "head must be linear or activated, not 'x'"),  # pyright: ignore[reportArgumentType]
        (WindowMLP(0), (2, 6, 3), "window 0 does not divide the horizon 6"),
        (WindowMLP(1), (2, 6), "x_t has shape [2, 6], not [B, H, D]"),
        (WindowMLP(1, embedding=3), (2, 6, 3), "a time embedding has a width of 4 or more, not 3"),
        (HalfUnet(), (2, 6), "x_t has shape [2, 6], not [B, H, D]"),
        (HalfUnet(2), (2, 8, 3), "a time embedding has a width of 4 or more, not 2"),
        (HalfUnet(4, (3,)), (2, 8, 3), "a layer of 12 channels has no 8 equal groups: give"),
    ],
)
def test_networks_that_cannot_be(net, shape, said):
    """Another cut, reduce or head was taken for one of those that are known."""
    with pytest.raises(InputError, match=re.escape(said)):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(2, jnp.int32))
