"""A layer at a time gives what one program for all layers gives, and copies no weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tuco import random_models as rm
from tuco_jax.core.by_layer import ByLayer
from tuco_jax.core.decompose import last_token


@pytest.mark.parametrize("make", [rm.full_pair, rm.adapter_pair])
@pytest.mark.parametrize("norm", [1, 2])
def test_it_is_the_last_token_form(make, norm):
    pair = make()
    tokens, mask = map(np.asarray, rm.batch())
    expected = last_token(pair, jnp.asarray(tokens), jnp.asarray(mask), norm=norm)
    tuco, layers, telescoping = ByLayer(pair, norm)(tokens, mask)
    np.testing.assert_allclose(tuco, expected.tuco, rtol=0, atol=1e-6)
    np.testing.assert_allclose(layers, expected.layers.T, rtol=0, atol=1e-6)
    assert telescoping.shape == tuco.shape and float(telescoping.max()) < 1e-5


def test_one_layer():
    config = rm.config(depth=1, rope_index=(0,), windows=(0,))
    pair = rm.full_pair(base=config)
    tokens, mask = map(np.asarray, rm.batch())
    expected = last_token(pair, jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(ByLayer(pair)(tokens, mask)[0], expected.tuco, rtol=0, atol=1e-6)


def test_weights_are_views():
    """Matrices whose size is a multiple of 64 bytes: an odd one would be copied, and work, too."""
    pair = rm.full_pair()
    stacked = pair.base["layers"]["mlp"]["up"]["kernel"]
    assert stacked[0].nbytes % 64 == 0
    start = stacked.unsafe_buffer_pointer()
    for index, (base, *_) in enumerate(ByLayer(pair)._layers):
        kernel = base["mlp"]["up"]["kernel"]
        assert kernel.unsafe_buffer_pointer() == start + index * stacked[0].nbytes


def test_where_it_fits():
    pair = rm.full_pair()
    assert ByLayer.fits(pair)
    elsewhere = jax.device_put(pair.base, jax.devices()[1])
    assert not ByLayer.fits(dataclasses.replace(pair, base=elsewhere))
