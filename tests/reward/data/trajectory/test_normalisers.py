import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.preprocessing

from common_jax.errors import InputError
from reward_jax.data.trajectory.normalisers import gaussian, limits

ROWS = np.random.default_rng(0).normal(3, [1, 10, 0.01, 1], (500, 4)).astype(np.float32)
ROWS[:, 3] = 0.1  # constant, and no power of two


@pytest.mark.parametrize(
    ("fit", "reference"),
    [
        (limits, sklearn.preprocessing.MinMaxScaler((-1, 1))),
        (gaussian, sklearn.preprocessing.StandardScaler()),
    ],
)
def test_against_scikit_learn(fit, reference):
    normaliser = fit(ROWS)
    got = normaliser.normalise(ROWS)
    assert got.dtype == np.float32 and normaliser.kind == fit.__name__
    expected = reference.fit_transform(ROWS.astype(np.float64))
    np.testing.assert_allclose(got[:, :3], expected[:, :3], atol=1e-4)
    np.testing.assert_array_equal(got[:, 3], 0)
    assert normaliser.scale[3] == 1
    np.testing.assert_allclose(normaliser.restore(got), ROWS, rtol=1e-5)


def test_parts_and_conversions():
    one, other = limits(ROWS), gaussian(ROWS[:100] * 2 + 1)
    x = ROWS[:5].reshape(5, 1, 4)
    np.testing.assert_allclose(
        one.part(slice(1, 3)).normalise(x[..., 1:3]), one.normalise(x)[..., 1:3]
    )
    convert = one.to(other)
    np.testing.assert_allclose(
        convert.normalise(one.normalise(x)), other.normalise(x), rtol=1e-3, atol=1e-3
    )
    # d log p / d z_other = d log p / d z_one / scale: check on log p = -|x|^2 / 2 of raw rows.
    score = jax.grad(lambda z, n: -(n.restore(z) ** 2).sum() / 2)
    np.testing.assert_allclose(
        score(jnp.asarray(other.normalise(x)), other),
        score(jnp.asarray(one.normalise(x)), one) * convert.scale[None, None],
        rtol=1e-3,
    )


def test_it_is_a_pytree_for_jit():
    normaliser = limits(ROWS)
    assert len(jax.tree.leaves(normaliser)) == 2
    got = jax.jit(lambda n, x: n.restore(n.normalise(x)))(normaliser, ROWS)
    np.testing.assert_allclose(got, ROWS, rtol=1e-5)


def test_rows_are_wanted():
    for rows in (np.zeros(3), np.zeros((0, 3))):
        with pytest.raises(InputError, match="fitted to rows"):
            limits(rows)
