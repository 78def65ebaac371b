"""Diagnostics where the answer is known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from common_jax.errors import InputError
from reward_jax.diffusion.process import FirstState, x0_to_score
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.reward.diagnostics import antisymmetric_part, explained_fraction, seed_agreement
from reward_jax.reward.gradients import ScoreDifference, ValueGuide
from reward_jax.reward.relative import RelativeReward
from reward_jax.reward.targets import unit
from tests.reward.closed_forms import LinearScore, LogRatio, mixture

T, D = 6, 3
SCHEDULE = cosine_schedule(T)
KEY = jax.random.key(0)


class Quadratic:
    """x' M x / 2 with params {"m": [D, D], "unit": [T]}, in any unit."""

    def apply(self, variables, x, t):
        params = variables["params"]
        x = x.reshape(len(x), -1)
        return params["unit"][t] * jnp.einsum("bi,ij,bj->b", x, params["m"], x) / 2


QUADRATIC = Quadratic()


@pytest.fixture(scope="module")
def pair():
    one, two = (mixture(s, SCHEDULE, dimensions=D, components=2) for s in (0, 1))
    return one, two


@pytest.fixture(scope="module")
def x_0():
    return jax.random.normal(jax.random.key(1), (400, D))


@struct.dataclass
class Scaled:
    """A reward that goes some of the way."""

    ratio: LogRatio
    by: float

    def __call__(self, x, t):
        return self.by * self.ratio(x, t) + t.astype(
            x.dtype
        )  # a constant for each t is nobody's business


@pytest.mark.parametrize("by", [1.0, 0.6, 0.0, -1.0])
def test_the_exact_reward_explains_all_and_a_part_of_it_its_part(pair, x_0, by):
    reward = ValueGuide(Scaled(LogRatio(*pair), by))
    got = explained_fraction(reward, pair[0], pair[1], x_0, SCHEDULE, key=KEY)
    assert got.shape == (T,)
    np.testing.assert_allclose(got, np.full(T, 1 - (1 - by) ** 2), atol=1e-4)


def test_the_difference_itself_explains_all(x_0):
    field, zero = (LinearScore(m) for m in jax.random.normal(jax.random.key(2), (2, D, D)))
    got = explained_fraction(ScoreDifference(zero, field), zero, field, x_0, SCHEDULE, key=KEY)
    np.testing.assert_array_equal(got, np.ones(T))


@pytest.mark.parametrize("target", ["score", "epsilon", "posterior_mean"])
def test_what_is_no_gradient_is_not_explained(x_0, target):
    """The symmetric part explains |M x|^2 ... exactly 1 - E|K x|^2 / E|A x|^2, in any unit."""
    matrix = jax.random.normal(jax.random.key(2), (D, D))
    even, odd = (matrix + matrix.T) / 2, (matrix - matrix.T) / 2
    zero, field = LinearScore(jnp.zeros((D, D))), LinearScore(matrix)
    params = {"m": even, "unit": unit(SCHEDULE, target)}
    got = explained_fraction(
        RelativeReward(params, SCHEDULE, QUADRATIC, target), zero, field, x_0, SCHEDULE, key=KEY
    )
    # x_t is standard normal here, whatever t: E|K x|^2 = |K|^2.
    wanted = 1 - jnp.sum(odd**2) / jnp.sum(matrix**2)
    np.testing.assert_allclose(got, np.full(T, wanted), atol=0.08)


def test_antisymmetric_part_of_a_linear_field(x_0):
    matrix = jax.random.normal(jax.random.key(3), (D, D)) + 0.5
    fields = LinearScore(0.3 * jnp.eye(D)), LinearScore(matrix)
    jacobian = matrix - 0.3 * jnp.eye(D)
    wanted = jnp.sum(((jacobian - jacobian.T) / 2) ** 2) / jnp.sum(jacobian**2)
    got = antisymmetric_part(*fields, x_0, SCHEDULE, key=KEY, probes=8)
    np.testing.assert_allclose(got, np.full(T, wanted), rtol=0.08)
    assert 0.1 < wanted < 0.9
    turn = LinearScore(jnp.array([[0.0, 1.0, 0], [-1.0, 0.0, 0], [0, 0, 0]]))
    zero = LinearScore(jnp.zeros((D, D)))
    np.testing.assert_allclose(
        antisymmetric_part(zero, turn, x_0, SCHEDULE, key=KEY), np.ones(T), rtol=1e-5
    )


def test_a_gradient_field_has_no_antisymmetric_part(pair, x_0):
    got = antisymmetric_part(pair[0], pair[1], x_0[:50], SCHEDULE, key=KEY, probes=2)
    # float32 is all that is left, where at the last t the two scores are nearly the same.
    assert np.abs(got).max() < 1e-6


def test_pinned_entries_do_not_count():
    """What happens at the first state is not matched, so it must not be judged."""
    x_0 = jax.random.normal(jax.random.key(4), (300, 3, 2))
    pin = FirstState()

    @struct.dataclass
    class Field:
        """s_i = (0, then M x_i + N x_0): the coupling to what is given is no asymmetry."""

        m: jax.Array

        def __call__(self, x, t, cond=None):
            y = x @ self.m.T + 5 * x[:, :1]
            return y.at[:, 0].set(7.0)

    matrix = jax.random.normal(jax.random.key(5), (2, 2))
    zero = LinearScore(jnp.zeros((2, 2)))
    odd = jnp.sum(((matrix - matrix.T) / 2) ** 2) / jnp.sum(matrix**2)
    got = antisymmetric_part(zero, Field(matrix), x_0, SCHEDULE, key=KEY, probes=8, pin=pin)
    np.testing.assert_allclose(got, np.full(T, odd), rtol=0.1, atol=0.01)


def test_agreement_of_seeds(x_0):
    matrices = jax.random.normal(jax.random.key(6), (2, D, D))
    tables = jnp.ones((2, T))

    def agreement(m):
        reward = RelativeReward({"m": m, "unit": tables}, SCHEDULE, QUADRATIC, seeds=2)
        return seed_agreement(reward, x_0, key=KEY)

    np.testing.assert_allclose(agreement(matrices[jnp.array([0, 0])]), np.ones(T), atol=1e-5)
    np.testing.assert_allclose(
        agreement(matrices[:1] * jnp.array([1.0, -2.0])[:, None, None]), -np.ones(T), atol=1e-5
    )
    even = (matrices + matrices.mT) / 2
    cosine = jnp.sum(even[0] * even[1]) / jnp.sqrt(jnp.sum(even[0] ** 2) * jnp.sum(even[1] ** 2))
    np.testing.assert_allclose(agreement(matrices), np.full(T, cosine), atol=0.12)
    one = RelativeReward({"m": matrices[0], "unit": tables[0]}, SCHEDULE, QUADRATIC)
    with pytest.raises(ValueError, match="two seeds or more"):
        seed_agreement(one, x_0, key=KEY)


def test_gradients_are_taken_where_the_reward_was_trained(x_0):
    """Over a standard normal, mu(x_t) = k x_t, k = sqrt(1 - beta_t): M / k is exact there."""
    matrix = jax.random.normal(jax.random.key(8), (D, D))
    matrix = matrix + matrix.T
    base, expert = LinearScore(-jnp.eye(D)), LinearScore(matrix - jnp.eye(D))
    k = jnp.sqrt(1 - SCHEDULE.betas)
    params = {"m": matrix, "unit": unit(SCHEDULE, "epsilon") / k}
    reward = RelativeReward(params, SCHEDULE, QUADRATIC, "epsilon")
    asked = reward, base, expert, x_0, SCHEDULE
    at_mean = explained_fraction(*asked, key=KEY, gradient_at="posterior_mean")
    np.testing.assert_allclose(at_mean, np.ones(T), atol=1e-4)
    at_x_t = explained_fraction(*asked, key=KEY)
    np.testing.assert_allclose(at_x_t, 1 - (1 / k - 1) ** 2, rtol=1e-3)
    assert at_x_t[-1] < -100
    with pytest.raises(InputError, match="gradient_at is x_t or posterior_mean, not 'x_0'"):
        explained_fraction(*asked, key=KEY, gradient_at="x_0")  # pyright: ignore[reportArgumentType]


def test_agreement_of_seeds_at_the_posterior_mean(x_0):
    """Seeds that differ in one dimension alone, where the posterior mean is 0 and x_t is not."""

    @struct.dataclass
    class Base:
        def x0(self, x, t, cond=None):
            back = SCHEDULE.posterior_xt[t] / SCHEDULE.posterior_x0[t]
            estimate = (-back[:, None] * x).at[:, :2].set(x[:, :2])
            return estimate * (0 if cond is None else cond)

        def __call__(self, x, t, cond=None):
            return x0_to_score(SCHEDULE, self.x0(x, t, cond), x, t)

    m = jnp.stack([jnp.diag(jnp.array([1.0, 1, 9])), jnp.diag(jnp.array([1.0, 1, -9]))])
    reward = RelativeReward({"m": m, "unit": jnp.ones((2, T))}, SCHEDULE, QUADRATIC, seeds=2)
    data = (x_0, jnp.ones((len(x_0), 1)))
    at_mean = seed_agreement(reward, data, key=KEY, base_score=Base())
    np.testing.assert_allclose(at_mean, np.ones(T), atol=1e-5)
    assert seed_agreement(reward, data, key=KEY).max() < -0.9


def test_a_condition_reaches_the_scores(pair, x_0):
    """Teachers that only the condition tells apart: what is measured is of their difference."""
    matrix = jax.random.normal(jax.random.key(7), (D, D))
    even, odd = (matrix + matrix.T) / 2, (matrix - matrix.T) / 2
    cond = jnp.linspace(0.5, 2.0, len(x_0))

    def base(x, t, cond=None):
        return -x

    def expert(x, t, cond: Any = None):
        return -x + cond[:, None] * (x @ matrix.T)

    data = (x_0, cond)
    got = antisymmetric_part(base, expert, data, SCHEDULE, key=KEY, probes=16)
    np.testing.assert_allclose(got, np.full(T, np.sum(odd**2) / np.sum(matrix**2)), atol=0.05)
    params = {"m": even, "unit": unit(SCHEDULE, "score")}
    reward = RelativeReward(params, SCHEDULE, QUADRATIC, "score")
    got = explained_fraction(reward, base, expert, data, SCHEDULE, key=KEY)
    x, c = np.asarray(jax.random.normal(KEY, x_0.shape)), np.asarray(cond)[:, None]
    wanted = c * (x @ np.asarray(matrix).T)
    left = np.sum((x @ np.asarray(even) - wanted) ** 2) / np.sum(wanted**2)
    np.testing.assert_allclose(got, np.full(T, 1 - left), atol=0.08)


def test_what_does_not_fit_is_refused(pair, x_0):
    short, (base, expert) = jnp.asarray(x_0[:4]), pair
    with pytest.raises(InputError, match="base_score has 6 diffusion steps, the schedule 7; give"):
        antisymmetric_part(base, expert, short, cosine_schedule(T + 1), key=KEY)
    exact = ValueGuide(LogRatio(*pair))
    with pytest.raises(InputError, match="reward has 6 diffusion steps, the schedule 5; give the"):
        explained_fraction(exact, base, expert, short, cosine_schedule(T - 1), key=KEY)
    with pytest.raises(InputError, match="x_0 is int32, not floating numbers: scale it to about"):
        explained_fraction(exact, base, expert, short.astype(int), SCHEDULE, key=KEY)
