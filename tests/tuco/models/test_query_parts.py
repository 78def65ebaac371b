"""Long rows are attended to in parts, which changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tuco import random_models as rm
from tuco_jax.models.attention import _query_parts
from tuco_jax.models.layers import (
    Positions,
    block_delta,
    block_keys_values,
    layer_infos,
    whole_block,
)


@pytest.mark.parametrize("length", [129, 514])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layer", [0, 1])  # the second one has a window
def test_parts_are_the_whole(length, side, layer):
    config = rm.config(max_positions=1024)
    params = jax.tree.map(lambda x: x[layer], rm.params(config, 0)["layers"])
    info = jax.tree.map(lambda x: x[layer], layer_infos(config))
    mask = np.arange(length) < np.array([[length], [length // 2], [1]])
    mask = jnp.asarray(mask if side == "right" else mask[:, ::-1])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*mask.shape, config.width)), jnp.float32)
    at = Positions.of(config, mask)
    keys_values = block_keys_values(config, {"params": params}, x, at, info)
    one_piece = block_delta(config, {"params": params}, x, keys_values, at, at, info)
    parts = whole_block(config, {"params": params}, x, at, info)
    for a, b in zip(parts, one_piece, strict=True):
        np.testing.assert_allclose(a[mask], b[mask], rtol=0, atol=1e-5)
        assert bool(jnp.isfinite(a).all())


def test_where_rows_are_cut():
    at = Positions.of(rm.config(), jnp.ones((1, 4)))
    other = Positions.of(rm.config(), jnp.ones((1, 4)))
    assert _query_parts(at, at, 95, 95) == [(0, 95, 95)]
    assert _query_parts(at, at, 97, 97)[::3] == [(0, 24, 24), (72, 97, 97)]
    assert [stop for _, stop, _ in _query_parts(at, at, 512, 512)] == list(range(64, 513, 64))
    assert _query_parts(at, other, 512, 600) == [(0, 512, 600)]
    packed = Positions.of(rm.config(), jnp.ones((1, 4)), jnp.zeros((1, 4), int))
    assert _query_parts(packed, packed, 512, 512) == [(0, 512, 512)]
