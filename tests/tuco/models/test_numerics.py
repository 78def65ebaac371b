"""Products and caps in float32, whatever the weights are."""

import jax.numpy as jnp
import numpy as np
import pytest

from tuco_jax.models.numerics import along_last, matmul, softcap


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_added_in_float32(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 2048)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(2048, 4)), dtype)
    out = matmul(x, kernel)
    assert out.dtype == jnp.float32
    exact = np.asarray(x.astype(dtype), np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(out, exact, atol=2e-4)


def test_caps_and_vectors():
    x = jnp.asarray([[-100.0, 0.1, 100.0]])
    np.testing.assert_allclose(softcap(x, 5.0), 5 * np.tanh(np.asarray(x) / 5), rtol=1e-6)
    assert softcap(x, 0.0) is x
    assert along_last(jnp.ones(3, jnp.bfloat16), x[None]).shape == (1, 1, 3)
