"""Products and caps in float32, whatever the weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tuco_jax.models.numerics import along_last, matmul, product, ragged_product, softcap

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(256, 24)), jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_added_in_float32(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 2048)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(2048, 4)), dtype)
    out = matmul(x, kernel)
    assert out.dtype == jnp.float32
    exact = np.asarray(x.astype(dtype), np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(out, exact, atol=2e-4)


def exact(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64)


@pytest.mark.parametrize("rows", [3, 100])
def test_parts_hold_what_they_say(rows):
    """Whether parts share one product, as few rows do, or have one each."""
    x = jnp.asarray(RNG.normal(size=(2, rows // 2, 256)), jnp.float32)
    size = np.abs(exact(jnp.abs(x), jnp.abs(W)))
    for precision, least, most in (
        ("bfloat16", 1e-4, 4e-3),
        ("bfloat16x2", 5e-8, 1e-5),
        ("bfloat16x3", 0, 4e-7),
        ("float32", 0, 4e-7),
    ):
        out = jax.jit(product, static_argnums=2)(x, W, precision)
        error = np.abs(out - exact(x, W)) / size
        assert out.dtype == jnp.float32 and least <= error.max() < most, precision


def test_wider_kernels_are_not_rounded_for_parts():
    x, wide = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((4, 8), (8, 5)))
    np.testing.assert_array_equal(product(x, wide, "bfloat16x2"), product(x, wide, "float32"))
    half = wide.astype(jnp.float16)
    np.testing.assert_array_equal(
        product(x, half, "bfloat16x3"), product(x, half.astype(jnp.float32), "float32")
    )


@pytest.mark.parametrize("rows", [3, 100])
def test_integers_are_as_exact_as_bfloat16_weights(rows):
    """At every precision; with one scale for each output, and each of several kernels'."""
    x = jnp.asarray(RNG.normal(size=(rows, 256)), jnp.float32)
    integers = jnp.asarray(RNG.integers(-127, 128, (2, 256, 24)), jnp.int8)
    scales = jnp.asarray(RNG.uniform(1e-3, 1e-1, (2, 24)), jnp.float32)
    wide = np.asarray(integers, np.float64) * np.asarray(scales, np.float64)[:, None]
    sizes = np.asarray([rows // 3, rows - rows // 3])
    which = np.repeat([0, 1], sizes)
    of_each = np.stack([exact(row, wide[k]) for row, k in zip(x, which, strict=True)])
    most = {"bfloat16": 4e-3, "bfloat16x2": 1e-5, "bfloat16x3": 4e-7, "float32": 4e-7}
    for precision, bound in most.items():
        one = jax.jit(product, static_argnums=2)(x, integers[0], precision, scales[0])
        size = exact(jnp.abs(x), np.abs(wide[0]))
        assert one.dtype == jnp.float32 and (np.abs(one - exact(x, wide[0])) / size).max() < bound
        run = jax.jit(ragged_product, static_argnums=3)
        several = run(x, integers, jnp.asarray(sizes), precision, scales)
        size = np.stack([exact(abs(r), abs(wide[k])) for r, k in zip(x, which, strict=True)])
        assert (np.abs(several - of_each) / size).max() < bound


@pytest.mark.parametrize("precision", ["bfloat16x3", "bfloat16x2"])
def test_derivatives_of_parts_are_in_float32(precision):
    x = jnp.asarray(RNG.normal(size=(3, 256)), jnp.float32)

    def loss(x, w, precision):
        return jnp.sum(jnp.sin(jax.vmap(product, (0, None, None))(x, w, precision)))

    both = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    for ours, wanted in zip(both(x, W, precision), both(x, W, "float32"), strict=True):
        ours, wanted = (np.asarray(a, np.float32) for a in (ours, wanted))
        np.testing.assert_allclose(ours, wanted, rtol=1e-2, atol=2e-4 * np.abs(wanted).max())
    of_x = both(x, W, precision)[0]
    np.testing.assert_allclose(of_x, both(x, W, "float32")[0], atol=1e-3)
    _, along = jax.jvp(lambda x: product(x, W, precision), (x,), (x,))
    np.testing.assert_allclose(along, exact(x, W), atol=1e-4)


def test_ragged_rows_are_products_with_their_own_kernels():
    x = jnp.asarray(RNG.normal(size=(9, 16)), jnp.float32)
    kernels = jnp.asarray(RNG.normal(size=(2, 16, 5)), jnp.bfloat16)

    def apart(x):
        return [product(x[:4], kernels[0], "bfloat16x2"), product(x[4:], kernels[1], "bfloat16x2")]

    def ragged(x):
        return ragged_product(x, kernels, jnp.asarray([4, 5]), "bfloat16x2")

    np.testing.assert_allclose(ragged(x), jnp.concatenate(apart(x)), atol=1e-5)
    slopes = [jax.grad(lambda x, f=f: sum(map(jnp.sum, f(x))))(x) for f in (apart, ragged)]
    np.testing.assert_allclose(*slopes, atol=1e-5)


def test_caps_and_vectors():
    x = jnp.asarray([[-100.0, 0.1, 100.0]])
    np.testing.assert_allclose(softcap(x, 5.0), 5 * np.tanh(np.asarray(x) / 5), rtol=1e-6)
    assert softcap(x, 0.0) is x
    assert along_last(jnp.ones(3, jnp.bfloat16), x[None]).shape == (1, 1, 3)
