"""Patches and sides of images: nothing is lost, and each pixel stays at its place."""

import jax.numpy as jnp
import numpy as np
import pytest

from reward_jax.models.unet2d.layers import from_patches, to_patches


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patches_come_back_and_are_neighbours(patch):
    x = np.random.default_rng(0).normal(size=(2, 6, 12, 3)).astype(np.float32)
    cut = to_patches(jnp.asarray(x), patch)
    assert cut.shape == (2, 6 // patch, 12 // patch, patch**2 * 3)
    np.testing.assert_array_equal(cut[1, 1, 0], x[1, patch : 2 * patch, :patch].reshape(-1))
    np.testing.assert_array_equal(from_patches(cut, patch), x)
