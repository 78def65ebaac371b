"""Sources draw what they hold; what is no data is named."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.diffusion.sources import Mixed, Rows, Strided, as_source, split_batch


def test_sources_draw_what_they_hold():
    rows = jnp.arange(30.0).reshape(10, 3)
    pair = Rows((rows, rows[:, 0]))
    x, cond = pair.sample(jax.random.key(0), 500)
    np.testing.assert_array_equal(x[:, 0], cond)
    assert set(np.unique(cond).tolist()) == set(rows[:, 0].tolist())
    strided = Strided(rows, jnp.array([0, 5]), horizon=3, stride=2)
    windows = strided.sample(jax.random.key(1), 100)
    assert windows.shape == (100, 3, 3)
    found = np.unique(np.asarray(windows[:, :, 0]), axis=0)
    np.testing.assert_array_equal(found, [[0, 6, 12], [15, 21, 27]])
    mixed = Mixed((Rows(rows), Rows(rows + 100), Rows(rows + 200))).sample(jax.random.key(2), 11)
    kinds = np.asarray(mixed[:, 0]) // 100
    np.testing.assert_array_equal(kinds, np.repeat([0, 1, 2], [5, 3, 3]))


def test_arrays_are_sources_and_sources_stay():
    rows = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    assert isinstance(as_source(rows), Rows) and as_source(source := Rows(rows)) is source
    with pytest.raises(InputError, match="list cannot be drawn from: give an array x_0"):
        as_source([rows])
    with pytest.raises(InputError, match=r"arrays of one data set have \[4, 5\] rows"):
        as_source((rows, rows[:4]))


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), "x_0 is uint8, not floating numbers: scale it to"),
        (jnp.zeros((2, 3), jnp.int32), "x_0 is int32, not floating numbers"),
        (np.zeros(3, bool), "x_0 is bool"),
        ((np.zeros(3, np.int8), np.zeros(3)), "x_0 is int8"),
        ((np.zeros(3), np.zeros(3), np.zeros(3)), "a batch of 3 parts: give x_0, or (x_0, con"),
        ([1.0], "x_0 is a list, not an array [B, ...]"),
    ],
)
def test_what_is_no_batch(batch, said):
    with pytest.raises(InputError, match=re.escape(said)):
        split_batch(batch)


def test_a_condition_may_be_any_tree():
    x_0, cond = split_batch((jnp.ones((2, 3)), {"label": np.array([1, 2])}))
    assert x_0.shape == (2, 3) and cond is not None
    assert split_batch(x_0)[1] is None
