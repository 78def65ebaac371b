"""Images as models see them, by class; and the space of models of them."""

import jax
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data import spaces
from reward_jax.data.images.pixels import ImageRows, Images, ImageSpace, scaled, unscaled

PIXELS = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)


def test_values_come_back():
    x = scaled(PIXELS)
    assert x.dtype == np.float32 and x.min() == -1 and x.max() == 1
    np.testing.assert_array_equal(unscaled(x), PIXELS)
    assert unscaled(np.array([-3.0, 3.0])).tolist() == [0, 255]


def test_batches_are_drawn_scaled():
    found = np.asarray(ImageRows(jax.numpy.asarray(PIXELS)).sample(jax.random.key(0), 20))
    assert found.shape == (20, 8, 8, 1)
    np.testing.assert_allclose(found, scaled(unscaled(found)), atol=1e-6)
    assert {row.tobytes() for row in unscaled(found)} == {row.tobytes() for row in PIXELS}


def test_by_class():
    images = Images(PIXELS, np.array([0, 1, 1, 2]), ("bag", "coat", "shoe"), "here")
    assert images.numbers(["shoe", "bag"]) == [2, 0]
    chosen = images.choose(np.array([0, 3]))
    np.testing.assert_array_equal(chosen.pixels, PIXELS[[0, 3]])
    assert chosen.known_labels().tolist() == [0, 2] and len(chosen) == 2
    with pytest.raises(InputError, match="here: has no class 'hat'; its classes are bag, coat"):
        images.numbers(["hat"])
    with pytest.raises(InputError, match="here: has no labels"):
        Images(PIXELS, None, (), "here").known_labels()


def test_a_space_comes_back():
    space = ImageSpace(8, 9, 3, {"data": "here"})
    assert space.shape == (8, 9, 3) and space.pin is None
    described = spaces.describe(space)
    assert described["kind"] == "images"
    assert spaces.make(described, ImageSpace, "a file") == space
    for change in ({"height": 0}, {"channels": 2.0}, {"about": None}):
        with pytest.raises(ValueError, match=f"its {next(iter(change))} is"):
            spaces.make(described | change, ImageSpace, "a file")
