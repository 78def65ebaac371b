"""Where tokens stand: padding on either side, segments, what follows a prefix."""

import jax.numpy as jnp
import numpy as np

from tests.tuco import random_models as rm
from tuco_jax.core.cache import Cache
from tuco_jax.core.places import Places, last_column, pick

PAIR = rm.full_pair(base=rm.config(depth=1, windows=(0,), rope_index=(0,)))
MASK = jnp.asarray([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]], bool)


def test_last_columns_and_what_stands_there():
    columns = last_column(MASK)
    assert columns.tolist() == [2, 3, 3]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    np.testing.assert_array_equal(pick(x, columns[:, None])[:, 0], x[jnp.arange(3), columns])


def test_positions_are_counts_of_real_tokens():
    places = Places.of(PAIR, MASK)
    index = np.asarray(places.tuned.query.index)
    for row, real in zip(index, np.asarray(MASK), strict=True):
        assert row[real].tolist() == list(range(real.sum()))
    assert places.tuned.selected is not None and places.columns is not None
    assert places.tuned.selected.index[:, 0].tolist() == [2, 1, 3]
    assert places.tuned.key is places.tuned.query


def test_positions_restart_at_each_segment():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0]])
    places = Places.of(PAIR, segments > 0, jnp.asarray([[1, 4]]), segments)
    assert places.base.query.index[0, :5].tolist() == [0, 1, 0, 1, 2]
    assert places.base.selected is not None
    assert places.base.selected.index.tolist() == [[1, 2]]


def test_what_follows_a_shared_prefix_sees_it():
    prefix = Cache.prefix((), jnp.ones(3, bool))
    mask = jnp.asarray([[1, 1], [1, 0]], bool)
    index = 3 + jnp.cumsum(mask, axis=1) - 1
    places = Places.after(PAIR, prefix, index, mask)
    assert places.tuned.key.index.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 3]]
    assert places.tuned.key.mask[1].tolist() == [True] * 4 + [False]
    assert places.columns is None and places.tuned.selected is None


def test_a_row_alone_has_a_cache_of_its_own():
    """Its columns are those of its cache; none follow, as they would a prefix."""
    mask = jnp.ones((1, 3), bool)
    cache = Cache.empty(PAIR, mask, 4, both=True)
    places = Places.after(PAIR, cache.bare(), jnp.asarray([[3]]), jnp.ones((1, 1), bool))
    assert places.tuned.key.index.tolist() == [list(range(7))]
