"""Long rows are attended to in parts on the CPU, packed ones too, which changes nothing."""

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


def positions(config, length, rows):
    """Three rows, padded on a side, or packed: prompts of unequal lengths and padding."""
    mask = np.arange(length) < np.array([[length], [length // 2], [1]])
    if rows != "packed":
        return Positions.of(config, jnp.asarray(mask if rows == "right" else mask[:, ::-1]))
    ends = np.array([[length // 5, length - 9], [1, length // 2], [length // 3, length]])
    segments = (np.arange(length)[None, :, None] >= ends[:, None]).sum(axis=-1) + 1
    segments = jnp.asarray(np.where(segments > 2, 0, segments))
    return Positions.of(config, segments > 0, segments)


@pytest.mark.slow
@pytest.mark.parametrize("length", [129, 514])
@pytest.mark.parametrize("rows", ["left", "right", "packed"])
@pytest.mark.parametrize("layer", [0, 1])  # the second one has a window
def test_parts_are_the_whole(length, rows, layer):
    config = rm.config(max_positions=1024)
    params = jax.tree.map(lambda x: x[layer], rm.params(config, 0)["layers"])
    info = jax.tree.map(lambda x: x[layer], layer_infos(config))
    at = positions(config, length, rows)
    mask = at.mask
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*mask.shape, config.width)), jnp.float32)
    keys_values = block_keys_values(config, {"params": params}, x, at, info)
    one_piece = block_delta(config, {"params": params}, x, keys_values, at, at, info)
    parts = whole_block(config, {"params": params}, x, at, info)
    for a, b in zip(parts, one_piece, strict=True):
        np.testing.assert_allclose(a[mask], b[mask], rtol=0, atol=1e-5)
        assert bool(jnp.isfinite(a).all())


@pytest.mark.parametrize("rows", ["right", "packed"])
def test_rows_that_attend_to_themselves_are_cut(rows):
    config = rm.config(max_positions=1024)
    params = jax.tree.map(lambda x: x[0], rm.params(config, 0)["layers"])
    info = jax.tree.map(lambda x: x[0], layer_infos(config))
    at = positions(config, 514, rows)
    x = jnp.zeros((*at.mask.shape, config.width))
    keys_values = block_keys_values(config, {"params": params}, x, at, info)
    whole = whole_block.lower(config, {"params": params}, x, at, info)
    other = block_delta.lower(config, {"params": params}, x, keys_values, at, at, info)
    products = [text.as_text().count("stablehlo.dot_general") for text in (whole, other)]
    assert products == [7 + 2 * 8, 5 + 2]  # those of q, k, v, o, gate, up and down; k and v before


def test_where_rows_are_cut():
    assert _query_parts(True, 95, 95) == [(0, 95, 95)]
    assert _query_parts(True, 97, 97)[::3] == [(0, 24, 24), (72, 97, 97)]
    assert [stop for _, stop, _ in _query_parts(True, 512, 512)] == list(range(64, 513, 64))
    assert _query_parts(False, 512, 600) == [(0, 512, 600)]
