"""Weights that adapters make, by their formulas; against `peft` they are in `test_adapter.py`."""

import numpy as np

from tuco_jax.weights.peft import merge

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_dora_has_the_norms_that_it_is_given():
    weight, delta, magnitude = normal(5, 7), normal(5, 7), np.abs(normal(5))
    merged = merge.dora(weight, delta, magnitude)
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), magnitude, rtol=1e-5)
    plain = merge.dora(weight, delta, np.linalg.norm(weight + delta, axis=1))
    np.testing.assert_allclose(plain, weight + delta, rtol=1e-4, atol=1e-6)


def test_products():
    a, b, c, d = normal(5, 2), normal(2, 7), normal(5, 2), normal(2, 7)
    np.testing.assert_allclose(merge.loha(a, b, c, d), (a @ b) * (c @ d), rtol=1e-5)
    w1, w2 = normal(2, 3), normal(4, 5)
    np.testing.assert_allclose(merge.lokr(w1, w2)[1 * 4 + 2, 2 * 5 + 3], w1[1, 2] * w2[2, 3])


def test_scales_of_either_side():
    weight, out, into = normal(5, 7), normal(5, 1), normal(1, 7)
    x = normal(7)
    np.testing.assert_allclose(merge.scaled(weight, out) @ x, out[:, 0] * (weight @ x), rtol=1e-4)
    np.testing.assert_allclose(merge.scaled(weight, into) @ x, weight @ (into[0] * x), rtol=1e-4)
