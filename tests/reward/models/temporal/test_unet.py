"""The temporal U-Net: shapes, and horizons that it cannot have."""

import jax
import jax.numpy as jnp
import pytest

from common_jax.errors import InputError
from reward_jax.models.temporal.unet import TemporalUnet


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(("multipliers", "horizon"), [((1,), 3), ((1, 2), 6), ((1, 1, 2), 4)])
def test_the_output_is_as_the_input(multipliers, horizon, attention):
    net = TemporalUnet(5, 8, multipliers, attention)
    x, t = jnp.zeros((2, horizon, 5)), jnp.zeros(2, jnp.int32)
    made, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t)
    assert made.shape == x.shape
    names = {name for name in variables["params"] if "attention" in name}
    assert len(names) == (2 * len(multipliers) if attention else 0)


def test_a_horizon_that_cannot_be_halved():
    x, t = jnp.zeros((2, 6, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(
        InputError, match="3 levels needs a horizon that is a multiple of 4, not 6"
    ):
        TemporalUnet(3, 8, (1, 2, 4)).init(jax.random.key(0), x, t)


@pytest.mark.parametrize(
    ("net", "shape", "said"),
    [
        (TemporalUnet(3, 12, (1,)), (2, 4, 3), "a layer of 12 channels has no 8 equal groups"),
        (TemporalUnet(3, 2, (4,)), (2, 4, 3), "a time embedding has a width of 4 or more, not 2"),
        (TemporalUnet(3, 8, ()), (2, 4, 3), "a U-Net needs multipliers, one a level"),
        (TemporalUnet(3, 8), (2, 4), "x_t has shape .2, 4., not .B, H, D."),
    ],
)
def test_networks_that_cannot_be(net, shape, said):
    with pytest.raises(InputError, match=said):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(2, jnp.int32))
