import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.preprocessing

from common_jax.errors import InputError
from reward_jax.data.trajectory.normalisers import Normaliser, gaussian, limits

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


@pytest.mark.parametrize("fit", [limits, gaussian])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e39])
def test_rows_that_float32_does_not_hold_are_refused(fit, value):
    rows = np.ones((4, 3))
    rows[2, 1] = value
    with pytest.raises(InputError, match="that float32 holds: dimension 1 has NaN, infinity or"):
        fit(rows)


@pytest.mark.parametrize("fit", [limits, gaussian])
@pytest.mark.parametrize("span", [0.0, 1e-45, 1e-40, 1e-37, 1e-30])
@pytest.mark.parametrize("at", [0.0, 1.0])
def test_a_dimension_that_hardly_moves_stays_finite(fit, span, at):
    rows = np.float32(at) + np.linspace(0, span, 9, dtype=np.float32)[:, None]
    normaliser = fit(rows)
    with np.errstate(all="raise", under="ignore"):
        got = normaliser.normalise(rows)
    assert np.isfinite(got).all() and np.abs(got).max() <= 3
    assert np.isfinite(jax.jit(lambda n, x: n.normalise(x))(normaliser, rows)).all()
    np.testing.assert_allclose(normaliser.restore(got), rows, rtol=1e-6)


@pytest.mark.parametrize("low", [1e7, 1e7 - 1, -1e7, 2**24 - 3, 123456.7])
@pytest.mark.parametrize("reach", [1, 2, 3])
def test_large_values_that_are_close_stay_within_limits(low, reach):
    """Their middle may be no float32: rounded, it moved them to 0 .. 2."""
    rows = np.array([[low], [low + reach]], np.float32)
    got = limits(rows).normalise(rows)
    assert np.abs(got).max() <= 1 and got[1] - got[0] > 0.9


@pytest.mark.parametrize("low", [1e7, -3e7, 2**24 - 3, 123456.7])
@pytest.mark.parametrize("ones", [1, 4, 7])
def test_large_values_that_are_close_keep_their_mean_square(low, ones):
    """Their mean may be no float32: rounded, it moved them by up to a deviation or more."""
    rows = np.full((8, 1), low, np.float32)
    rows[:ones] = np.nextafter(rows[:ones], np.float32(np.inf))
    got = gaussian(rows).normalise(rows)
    np.testing.assert_allclose(np.square(got, dtype=np.float64).mean(), 1, rtol=1e-5)
    far = low + 1e3 * np.random.default_rng(ones).normal(size=(500, 1))
    got = gaussian(far).normalise(far.astype(np.float32))
    np.testing.assert_allclose([got.mean(), got.std()], [0, 1], atol=5e-3)


def test_equality_is_measured_in_scales():
    one = Normaliser(np.array([0.0, 1e6]), np.array([1e-9, 1.0]))
    assert one.same_as(Normaliser(one.offset * (1 + 1e-7), one.scale * (1 + 1e-7)))
    assert not one.same_as(Normaliser(one.offset, one.scale * 5))
    assert not one.same_as(Normaliser(one.offset + np.array([1e-9, 0]), one.scale))
    assert not one.same_as(Normaliser(one.offset[:1], one.scale[:1]))
