"""Positions follow real tokens, and restart at each segment."""

import jax.numpy as jnp
import numpy as np

from tests.tuco import random_models as rm
from tuco_jax.models.config import Rope
from tuco_jax.models.positions import Positions, layer_infos, rotate

CONFIG = rm.config()


def test_padding_on_either_side():
    mask = jnp.asarray([[1, 1, 1, 0], [0, 1, 1, 1]])
    at = Positions.of(CONFIG, mask)
    np.testing.assert_array_equal(np.asarray(at.index)[np.asarray(at.mask)], [0, 1, 2] * 2)


def test_segments_restart_and_have_lengths_of_their_own():
    """Row 0 packs three and two tokens; dynamic NTK sees each one's own length."""
    dynamic = Rope((1.0, 0.1), switch=2, dynamic_factor=3.0)
    config = rm.config(ropes=(dynamic,), rope_index=(0, 0, 0))
    segments = jnp.asarray([[1, 1, 1, 2, 2]])
    packed = Positions.of(config, segments > 0, segments)
    np.testing.assert_array_equal(packed.index, [[0, 1, 2, 0, 1]])
    assert packed.cos is not None
    for start, stop in ((0, 3), (3, 5)):
        alone = Positions.of(config, jnp.ones((1, stop - start)))
        assert alone.cos is not None
        np.testing.assert_allclose(packed.cos[:, :, start:stop], alone.cos, rtol=1e-6)


def test_picked_places_are_those_of_the_whole():
    at = Positions.of(CONFIG, jnp.ones((2, 5)))
    some = at.pick(jnp.asarray([[4, 0], [1, 1]]))
    np.testing.assert_array_equal(some.index, [[4, 0], [1, 1]])
    assert some.sin is not None and at.sin is not None
    np.testing.assert_array_equal(some.sin[:, 0, 0], at.sin[:, 0, 4])


def test_rotation_keeps_norms_and_what_is_not_rotated():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 6, 2, 8)), jnp.float32)
    config = rm.config(ropes=(rm.rope(4),), rope_index=(0, 0, 0))
    at = Positions.of(config, jnp.ones((1, 6)))
    turned = rotate(x, at, layer_infos(config))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )
    assert np.abs(np.asarray(turned - x))[:, 1:].max() > 0.1
