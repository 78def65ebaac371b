"""The study's reward as a guide: its gradient is the difference of scores, however scaled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from common_jax.errors import InputError
from reward_jax import GuidanceOptions, RelativeReward, guided_sample
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.studies.i2p.reward import LatentNetwork, Scaling
from reward_jax.studies.i2p.steer import Steering, load_steering

SCHEDULE, SHAPE = cosine_schedule(50), (3, 4, 2)
T = np.array([40, 20, 20, 1])


def scaling(by: str, seed: int = 0) -> Scaling:
    rng = np.random.default_rng(seed)
    shape = (len(T), *(SHAPE if by == "pixel" else (1, 1, 1)))
    mean, deviation, size = rng.uniform(0.5, 2, (3, *shape)).astype(np.float32)
    for leaf in (mean, deviation, size):
        leaf[2] = leaf[1]  # one step, walked twice
    return Scaling(mean, deviation, size, T)


class Matched(nn.Module):
    """Its gradient in y is d / size at the steps of a chain, as a matched reward's is."""

    scaling: Any
    d: Any

    @nn.compact
    def __call__(self, y, t):
        step = np.argmax(np.asarray(t)[:, None] == T, 1)
        x = y * self.scaling.deviation[step] + self.scaling.mean[step]
        size = self.scaling.size[step]
        # The integral of 2 k x / size over y = (x - mean) / deviation, entry by entry.
        return jnp.sum(self.d * x**2 / (size * self.scaling.deviation[step]), (1, 2, 3))


@pytest.mark.parametrize("by", ["timestep", "pixel"])
def test_at_the_steps_of_a_chain_it_is_the_difference_of_scores(by):
    """Of a reward that is matched exactly, d = 2 k x: (eps_base - eps_safe) / sqrt(1 - abar)."""
    k = np.random.default_rng(1).normal(size=(1, *SHAPE)).astype(np.float32)
    reward = RelativeReward({}, SCHEDULE, Matched(scaling(by), k))
    guide = Steering.of(reward, scaling(by))
    x, t = jax.random.normal(jax.random.key(0), (3, *SHAPE)), jnp.array([1, 20, 40])
    wanted = 2 * k * x / SCHEDULE.sqrt_one_minus_alphas_cumprod[t].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(guide.gradient(x, t), wanted, rtol=1e-4, atol=1e-5)


def learned() -> RelativeReward:
    network = LatentNetwork(dim=8, multipliers=(1,), groups=4).make(SHAPE[-1])
    params = network.init(jax.random.key(1), jnp.zeros((1, *SHAPE)), jnp.zeros(1, jnp.int32))
    return RelativeReward(params["params"], SCHEDULE, network)


def test_scaled_by_step_it_is_the_gradient_of_the_scaled_reward():
    reward, s = learned(), scaling("timestep")
    guide = Steering.of(reward, s)
    x, t = jax.random.normal(jax.random.key(2), (2, *SHAPE)), jnp.array([40, 1])
    mean, deviation, size = (leaf[np.array([0, 3])] for leaf in (s.mean, s.deviation, s.size))

    def value(x):
        return jnp.sum((size * deviation)[:, 0, 0, 0] * reward((x - mean) / deviation, t))

    np.testing.assert_allclose(guide.gradient(x, t), jax.grad(value)(x), rtol=1e-4, atol=1e-7)


def test_between_steps_the_scaling_is_interpolated():
    reward, s = learned(), scaling("pixel")
    guide, x = Steering.of(reward, s), jax.random.normal(jax.random.key(3), (1, *SHAPE))
    per_score = SCHEDULE.sqrt_one_minus_alphas_cumprod
    for t, mix in ((25, 0.25), (45, 1.0), (40, 1.0), (20, 0.0)):
        mean, deviation, size = (
            mix * leaf[:1] + (1 - mix) * leaf[1:2] for leaf in (s.mean, s.deviation, s.size)
        )
        at = jnp.array([t])
        wanted = size * reward.learned_gradient((x - mean) / deviation, at) / per_score[t]
        np.testing.assert_allclose(guide.gradient(x, at), wanted, rtol=1e-4, atol=1e-7)


def test_a_chain_that_is_walked_in_one_step_has_its_scaling_everywhere():
    mean, deviation, size = (np.full((1, 1, 1, 1), v, np.float32) for v in (0.5, 2, 3))
    s = Scaling(mean, deviation, size, np.array([20]))
    reward, x = learned(), jax.random.normal(jax.random.key(4), (2, *SHAPE))
    t = jnp.array([3, 44])
    per_score = SCHEDULE.sqrt_one_minus_alphas_cumprod[t].reshape(-1, 1, 1, 1)
    wanted = 3 * reward.learned_gradient((x - 0.5) / 2, t) / per_score
    np.testing.assert_allclose(Steering.of(reward, s).gradient(x, t), wanted, rtol=1e-4, atol=1e-7)


def test_what_a_study_left_steers(done, tmp_path):
    guide = load_steering(done.config.out)
    schedule, key = guide.schedule, jax.random.key(0)
    how: dict[str, Any] = dict(sampler="ddim", sampling_steps=4)
    still, moved = (
        guided_sample(
            lambda x, t, cond=None: -x,
            schedule,
            (2, 4, 4, 4),
            key=key,
            guide=guide,
            options=GuidanceOptions(scale=scale, **how),
        )
        for scale in (0.0, 1.0)
    )
    assert np.isfinite(moved).all() and not np.allclose(still, moved)
    with pytest.raises(InputError, match=r"reward\.safetensors"):
        load_steering(tmp_path)
