"""A capped reward is the smooth minimum of the reward and a level that data give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from common_jax.errors import InputError
from reward_jax.diffusion.process import q_sample
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.reward.capped import CappedReward, cap_reward
from reward_jax.reward.extract import init_params
from reward_jax.reward.guide import GuidanceOptions, guided_sample
from reward_jax.reward.relative import RelativeReward

SCHEDULE = cosine_schedule(6)
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (12, 3))
T = jnp.arange(12) % 6


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        h = nn.Dense(16)(jnp.concatenate([x, t[:, None] / 6], 1))
        return nn.Dense(1)(jnp.tanh(h))[:, 0]


REWARD = RelativeReward(init_params(Network(), KEY, X[:1]), SCHEDULE, Network())


def test_it_is_the_smooth_minimum():
    level, width = jax.random.normal(jax.random.key(1), (6,)), jnp.linspace(0.1, 2, 6)
    found = np.asarray(CappedReward(REWARD, level, width)(X, T), np.float64)
    rho = np.asarray(REWARD(X, T), np.float64)
    c, w = (np.asarray(a[T], np.float64) for a in (level, width))
    np.testing.assert_allclose(found, c - w * np.logaddexp(0, (c - rho) / w), rtol=1e-5)
    assert (found < np.minimum(rho, c)).all()


def test_its_gradient_is_the_reward_s_where_that_is_low_and_0_above():
    own, rho = REWARD.gradient(X, T), REWARD(X, T)
    for shift, share in ((100.0, 1.0), (0.0, 0.5), (-100.0, 0.0)):
        # One row of each t, so that levels can be those of the rows.
        level = jnp.zeros(6).at[T[:6]].set(rho[:6] + shift)
        found = CappedReward(REWARD, level, jnp.full(6, 0.5)).gradient(X[:6], T[:6])
        np.testing.assert_allclose(found, share * own[:6], rtol=1e-5, atol=1e-7)


def test_levels_are_quantiles_of_noised_data():
    x_0 = jax.random.normal(jax.random.key(2), (400, 3))
    capped = cap_reward(REWARD, x_0, jax.random.key(3), quantile=0.3, width=0.5)
    for t in range(6):
        noise = jax.random.normal(jax.random.key(10 + t), x_0.shape)
        steps = jnp.full(400, t)
        rho = np.asarray(REWARD(q_sample(SCHEDULE, x_0, steps, noise), steps))
        assert 0.2 < (rho < capped.level[t]).mean() < 0.4
        assert capped.width[t] == pytest.approx(0.5 * rho.std(), rel=0.2)


def test_at_a_high_scale_what_is_good_enough_stays_where_the_base_has_it():
    """Of two harmless kinds the one that rho prefers a little grows, uncapped, by its power.

    A base of three narrow kinds, at the corners of a triangle; rho dislikes the first, and prefers
    the last to the second by .3. Scores are exact: of mixtures, noised.
    """
    schedule = cosine_schedule(40)
    angles, spread = 2 * jnp.pi / 3 * jnp.arange(3.0), 0.2
    places = 2 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], 1)  # [kinds, 2]
    tilt, even = jnp.array([[-3.0, 0.0, 0.3]]), jnp.zeros((1, 3))

    def log_density(x, t, weights):
        a = schedule.alphas_cumprod[t][:, None]
        squares = jnp.square(x[:, None] - jnp.sqrt(a)[..., None] * places[None]).sum(2)
        from_each = squares / (2 * (a * spread**2 + 1 - a))
        return jax.nn.logsumexp(jax.nn.log_softmax(weights) - from_each, axis=1)

    class Ratio(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            self.param("none", nn.initializers.zeros, ())
            return log_density(x, t, tilt) - log_density(x, t, even)

    def score(x, t, cond=None):
        return jax.grad(lambda x: log_density(x, t, even).sum())(x)

    reward = RelativeReward({"none": jnp.zeros(())}, schedule, Ratio(), "score")
    x_0 = spread * jax.random.normal(KEY, (512, 2)) + jnp.repeat(places[1:], 256, axis=0)
    guides = {"uncapped": reward, "capped": cap_reward(reward, x_0, KEY, quantile=0.1)}
    shares = {}
    for name, guide in guides.items():
        options = GuidanceOptions(scale=12.0, step="score", sampler="ddim", eta=1.0)
        x = guided_sample(score, schedule, (2000, 2), key=KEY, guide=guide, options=options)
        kinds = np.linalg.norm(np.asarray(x)[:, None] - np.asarray(places), axis=2).argmin(1)
        shares[name] = np.bincount(kinds, minlength=3) / len(kinds)
    assert max(share[0] for share in shares.values()) < 0.02
    liked = {name: share[2] / (share[1] + share[2]) for name, share in shares.items()}
    assert abs(liked["capped"] - 0.5) < 0.5 * abs(liked["uncapped"] - 0.5), shares


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantile": 1.5}, "quantile is 1.5 and width 0.25: give one of 0 to 1, and one above 0"),
        ({"width": 0.0}, "quantile is 0.7 and width 0.0"),
        ({"x_0": X[:1]}, "x_0 has 1 rows, of which levels are taken: give 2 or more"),
        ({"x_0": jnp.full((4, 3), jnp.nan)}, "the reward of x_0 is not finite"),
    ],
)
def test_what_cannot_be_capped(options, said):
    given = {"x_0": X} | options
    with pytest.raises(InputError, match=said):
        cap_reward(REWARD, given.pop("x_0"), KEY, **given)
