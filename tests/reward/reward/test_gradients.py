"""Guides give gradients of what is one number a row, and of nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from common_jax.errors import InputError
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.reward.discriminator import DiscriminatorGuide, train_discriminator
from reward_jax.reward.extract import extract_reward, init_params
from reward_jax.reward.gradients import (
    ScoreDifference,
    SteeredScore,
    ValueGuide,
    gradient_of,
)
from reward_jax.reward.relative import RelativeReward

SCHEDULE = cosine_schedule(5)
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 3))
T = jnp.arange(6) % 5


def test_the_gradient_of_a_value_is_each_row_s_own():
    found = ValueGuide(lambda x, t: (x**3).sum(1) * (t + 1).astype(x.dtype)).gradient(X, T)
    np.testing.assert_allclose(found, 3 * X**2 * np.asarray(T + 1, np.float32)[:, None], rtol=1e-5)
    found = gradient_of(lambda x, c: (x * c).sum(1), X, X + 1)
    np.testing.assert_allclose(found, X + 1, rtol=1e-6)


def test_the_difference_is_the_expert_s_less_the_base_s():
    guide = ScoreDifference(lambda x, t: x, lambda x, t: 3 * x)
    np.testing.assert_allclose(guide.gradient(X, T), 2 * X, rtol=1e-5)


@pytest.mark.parametrize("side", ["base", "expert"])
@pytest.mark.parametrize(("flat", "found"), [(lambda x, t: x[:, :1], r"\[6, 1\]"), (min, "int")])
def test_a_difference_is_never_broadcast(side, flat, found):
    """[B, 1] less [B, 3] was [B, 3] without a word."""
    flat = flat if flat is not min else lambda x, t: 0
    scores = {"base": lambda x, t: x, "expert": lambda x, t: x} | {side: flat}
    said = rf"the {side}'s score gives {found} for x_t of \[6, 3\]: its output must have the shape"
    with pytest.raises(InputError, match=said):
        ScoreDifference(**scores).gradient(X, T)


def test_a_steered_score_is_the_base_s_and_the_guide_s():
    guide = ScoreDifference(lambda x, t: x, lambda x, t: 3 * x)
    steered = SteeredScore(lambda x, t: -x, guide)
    np.testing.assert_allclose(steered(X, T), X, rtol=1e-5)
    again = ScoreDifference(lambda x, t: -x, steered)
    np.testing.assert_allclose(again.gradient(X, T), guide.gradient(X, T), rtol=1e-5)
    with pytest.raises(InputError, match=r"the guide's gradient gives \[6\] for x_t of \[6, 3\]"):
        SteeredScore(lambda x, t: x, Flat())(X, T)


class Flat:
    """A guide of another shape."""

    def gradient(self, x_t, t, cond=None):
        return x_t[:, 0]


def test_a_reward_is_distilled_into_another_network():
    dear = RelativeReward(init_params(Bowl(), KEY, X), SCHEDULE, Bowl(), "score")
    base = lambda x, t, cond=None: -x  # noqa: E731
    network = Bowl(two=True)
    params, history = extract_reward(
        base,
        SteeredScore(base, dear),
        network,
        init_params(network, jax.random.key(1), X),
        jax.random.normal(KEY, (256, 3)),
        SCHEDULE,
        optax.adam(0.02),
        steps=300,
        key=KEY,
        target="score",
    )
    assert history.explained[-1] > 0.99
    cheap = RelativeReward(params, SCHEDULE, network, "score")
    np.testing.assert_allclose(cheap.gradient(X, T), dear.gradient(X, T), atol=0.1)


class Bowl(nn.Module):
    """A quadratic: of one matrix, or of a product of two."""

    two: bool = False

    @nn.compact
    def __call__(self, x, t):
        y = nn.Dense(3, use_bias=False)(x)
        y = nn.Dense(3, use_bias=False)(y) if self.two else y
        return (x * y).sum(1)


class Column(nn.Module):
    """What a regression in another library returns: [B, 1]."""

    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(1)(x)


class Both(nn.Module):
    """A value, and something beside it."""

    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(1)(x)[:, 0], {"loss": 0}


class Whole(nn.Module):
    """One number for the whole batch."""

    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(1)(x).sum()


NOT_ROWS = [(Column(), r"\[6, 1\]"), (Whole(), r"\[\]"), (Both(), "tuple")]


@pytest.mark.parametrize(("network", "shape"), NOT_ROWS)
def test_a_reward_that_is_not_one_number_a_row_is_refused(network, shape):
    """By all that takes one; [B, 1] divided by [B] would be [B, B] without a word."""
    params = init_params(network, KEY, X)
    said = f"a reward gives {shape} for x_t of .*: it must be one number a row"
    reward = RelativeReward(params, SCHEDULE, network)
    several = RelativeReward(init_params(network, KEY, X, 2), SCHEDULE, network, seeds=2)
    judge = DiscriminatorGuide(params, network)
    value = ValueGuide(lambda x, t: network.apply({"params": params}, x, t))
    calls: list[Any] = [reward, reward.learned, reward.gradient, reward.learned_gradient]
    calls += [several, judge, judge.gradient, value.gradient]
    calls += [jax.jit(lambda x, t: reward(x, t))]
    for call in calls:
        with pytest.raises(InputError, match=said):
            call(X, T)
    adam, options = optax.adam(1e-3), dict(steps=1, key=KEY)
    own: Any = lambda x, t: x  # noqa: E731
    with pytest.raises(InputError, match=said.replace("6", r"\d+")):
        extract_reward(own, own, network, params, X, SCHEDULE, adam, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=said.replace("6", r"\d+")):
        train_discriminator(network, params, X, X, SCHEDULE, adam, **options)  # pyright: ignore[reportArgumentType]
