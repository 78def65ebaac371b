"""The reward of images: one number a row, rows apart, and what it refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.reward.relative import reward_gradient
from tests.reward.models.test_networks import random_params

TINY = functools.partial(HalfUNet2D, 2, dim=8, groups=4, patch=2)


@pytest.mark.parametrize(
    ("net", "shape"),
    [(TINY(), (3, 10, 6, 2)), (TINY(patch=1, multipliers=(1, 1, 2), blocks=2), (3, 5, 7, 2))],
    ids=["patches", "pixels"],
)
def test_a_number_a_row_that_depends_on_all_of_it(net, shape):
    x, t = jax.random.normal(jax.random.key(1), shape), jnp.array([0, 3, 9])
    params = random_params(net, shape)
    run = jax.jit(lambda x, t: net.apply({"params": params}, x, t))
    whole = run(x, t)
    assert whole.shape == (3,) and whole.dtype == jnp.float32
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(run(x[order], t[order]), whole[order], atol=1e-4)
    assert np.abs(run(x, t + 1) - whole).max() > 1e-5
    gradient = jax.jit(functools.partial(reward_gradient, net))(params, x, t)
    assert (np.abs(gradient).max(axis=3) > 0).all()


@pytest.mark.parametrize(
    ("net", "shape", "said"),
    [
        (TINY(), (2, 4, 4), "x_t has shape [2, 4, 4], not [B, H, W, C]"),
        (TINY(), (2, 4, 4, 1), "images of [4, 4, 1] (H, W, C) have 1 channels, and this network"),
        (TINY(), (2, 3, 4, 2), "images of 3 x 4 cannot be cut into patches of 2 x 2"),
        (TINY(multipliers=()), (2, 4, 4, 2), "a half U-Net needs multipliers, one a level"),
    ],
)
def test_images_that_do_not_fit(net, shape, said):
    with pytest.raises(InputError, match=re.escape(said)):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(2, jnp.int32))
