"""The key/value cache: room for new tokens at their own positions, and shared prefixes."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tests.tuco import random_models as rm
from tuco_jax.core.cache import Cache

CONFIG = rm.config(depth=2, windows=(0, 5), rope_index=(0, 1))
PAIR = rm.full_pair(base=CONFIG)
MASK = jnp.asarray([[1, 1, 1], [1, 0, 0]])


def test_an_empty_cache_has_its_rows_own_positions():
    cache = Cache.empty(PAIR, MASK, 2, both=True)
    assert len(cache.keys_values) == 2 and cache.at.index.shape[1] == 5 and int(cache.filled) == 0
    assert cache.keys_values[0][0].shape == (2, 2, CONFIG.kv_heads, 5, CONFIG.head_dim)
    # The first new token stands behind the prompt, wherever its column is.
    assert cache.at.index[:, 3:].tolist() == [[3, 4], [1, 2]]
    assert cache.at.mask.tolist() == [[True] * 5, [True, False, False, True, True]]
    assert len(Cache.empty(PAIR, MASK, 2, both=False).keys_values) == 1
    assert cache.bare().keys_values == ()


def test_columns_are_written_from_where_it_is_filled():
    cache = Cache.empty(PAIR, MASK, 2, both=False)
    cache = dataclasses.replace(cache, filled=jnp.int32(3))
    keys = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 1, 8)), jnp.float32)
    held = tuple(a[0] for a in cache.keys_values[0])
    written, _ = cache.write(held, (keys, keys))
    np.testing.assert_array_equal(written[:, :, 3:4], keys)
    assert not np.asarray(written[:, :, [0, 1, 2, 4]]).any()


def test_a_prefix_is_joined_to_every_row():
    rng = np.random.default_rng(1)
    old, new = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 8), (4, 2, 1, 8)))
    cache = Cache.prefix((), jnp.ones(3, bool))
    assert cache.shared and cache.at.index.shape[1] == 3 and int(cache.filled) == 3
    keys, _ = cache.join((old, old), (new, new))
    assert keys.shape == (4, 2, 4, 8)
    for row in range(4):
        np.testing.assert_array_equal(keys[row, :, :3], old)
    np.testing.assert_array_equal(keys[:, :, 3:], new)


def test_a_cache_whose_rows_begin_as_others_do():
    """By number; what a row has no part in is masked, and its own tokens go on behind its part."""
    rng = np.random.default_rng(2)
    held = tuple(jnp.asarray(rng.normal(size=(2, 2, 2, 3, 8)), jnp.float32) for _ in range(2))
    lead = Cache.empty(PAIR, jnp.ones((2, 3), int), 0, both=False)
    lead = dataclasses.replace(lead, keys_values=(held,), filled=jnp.int32(3))
    mask = jnp.asarray([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 1]])
    cache = Cache.empty(PAIR, mask, 2, both=False).led_by(lead, jnp.asarray([1, 0, 0]))
    keys = cache.keys_values[0][0]
    assert keys.shape == (2, 3, 2, 6, 8) and int(cache.filled) == 3
    np.testing.assert_array_equal(keys[:, :, :, :3], held[0][:, jnp.asarray([1, 0, 0])])
    assert not np.asarray(keys[:, :, :, 3:]).any()
    assert cache.at.index[:, 3:].tolist() == [[3, 4, 5], [1, 2, 3], [0, 1, 2]]
