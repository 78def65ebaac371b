"""Images as models see them, by class; and the space of models of them."""

import jax
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data import spaces
from reward_jax.data.images.pixels import (
    ImageRows,
    Images,
    ImageSpace,
    LabelledRows,
    scaled,
    tiled,
    unscaled,
)

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


def test_labels_are_drawn_with_their_images():
    labels = jax.numpy.arange(4)
    source = LabelledRows(jax.numpy.asarray(PIXELS), labels)
    x, found = source.sample(jax.random.key(0), 20)
    assert len(set(found.tolist())) == 4
    np.testing.assert_array_equal(unscaled(np.asarray(x)), PIXELS[np.asarray(found)])


def test_side_by_side():
    whole = tiled(PIXELS[:3], 2)
    assert whole.shape == (16, 16, 1)
    np.testing.assert_array_equal(whole[:8, 8:], PIXELS[1])
    np.testing.assert_array_equal(whole[8:, :8], PIXELS[2])
    assert not whole[8:, 8:].any() and tiled(PIXELS[:0], 2).shape == (8, 16, 1)


def test_samples_that_are_not_finite_are_refused():
    space = ImageSpace(8, 8, 1, {})
    np.testing.assert_array_equal(space.plans(scaled(PIXELS)), PIXELS)
    with pytest.raises(InputError, match=r"samples are not finite: lower guidance\.scale"):
        space.plans(np.array([[0.0, np.nan]]))


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
