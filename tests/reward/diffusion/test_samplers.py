"""Each move of each sampler, against diffusers' and against what is known of Gaussians."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import struct

from reward_jax.diffusion.process import convert
from reward_jax.diffusion.samplers import DDIM, Ancestral, Jump, Sampler
from reward_jax.diffusion.schedule import Schedule, cosine_schedule, linear_schedule
from reward_jax.reward.gradients import ScoreDifference
from reward_jax.reward.guide import GuidanceOptions, guided_sample
from tests.reward.closed_forms import mixture

B, D = 5, 3


def normal(seed):
    return jax.random.normal(jax.random.key(seed), (B, D))


def jumps(sampler: Sampler, schedule: Schedule) -> list[Jump]:
    levels = sampler.timesteps(schedule)
    return [Jump(t, to) for t, to in zip(levels, jnp.append(levels[1:], -1), strict=True)]


@pytest.mark.parametrize("schedule", [cosine_schedule(20), linear_schedule(20)])
@pytest.mark.parametrize("steps", [20, 10, 4, 1])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_diffusers(schedule, steps, eta):
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    theirs: Any = DDIMScheduler(
        num_train_timesteps=20,
        trained_betas=np.asarray(schedule.betas),
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="epsilon",
    )
    theirs.set_timesteps(steps)
    sampler = DDIM(steps, eta)
    np.testing.assert_array_equal(sampler.timesteps(schedule), theirs.timesteps)
    for i, jump in enumerate(jumps(sampler, schedule)):
        x_t, epsilon, noise = (normal(3 * i + j) for j in range(3))
        x_0 = convert(schedule, epsilon, x_t, jnp.full(B, jump.t), "epsilon", "x0")
        wanted = theirs.step(
            torch.from_numpy(np.array(epsilon)),
            int(jump.t),
            torch.from_numpy(np.array(x_t)),
            eta=eta,
            variance_noise=torch.from_numpy(np.array(noise)),
        )
        got, _ = sampler.move(schedule, jump, x_t, x_0, noise, jnp.float32(1), None)
        # Their tables are products of float32; where nearly nothing of x_0 is left, x_0 is large.
        size = max(float(np.abs(x_0).max()), 1)
        np.testing.assert_allclose(got, wanted.prev_sample, rtol=1e-5, atol=3e-6 * size)


@pytest.mark.parametrize("total, steps", [(20, 7), (150, 11), (3, 2), (50, 50), (9, 1)])
def test_any_number_of_steps(total, steps):
    """From the last diffusion step down, evenly, none twice."""
    levels = np.asarray(DDIM(steps).timesteps(cosine_schedule(total)))
    assert len(levels) == steps and levels[0] == total - 1 and (np.diff(levels) < 0).all()
    even = total * np.arange(steps, 0, -1) / steps - 1
    assert np.abs(levels - even).max() <= 0.5


@pytest.mark.parametrize("schedule", [cosine_schedule(30), linear_schedule(30)])
def test_ddim_with_eta_1_and_every_step_is_ancestral(schedule):
    one, other = Ancestral(), DDIM(eta=1.0)
    np.testing.assert_array_equal(one.timesteps(schedule), other.timesteps(schedule))
    for jump in jumps(one, schedule):
        given = (normal(0), normal(1), normal(2), jnp.float32(0.7), None)
        np.testing.assert_allclose(
            one.move(schedule, jump, *given)[0],
            other.move(schedule, jump, *given)[0],
            atol=2e-5,
        )


SCHEDULE = cosine_schedule(200)


@struct.dataclass
class TwoStep(Sampler):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): a sampler that looks back, in 15 lines."""

    steps: int = struct.field(pytree_node=False)

    def timesteps(self, schedule):
        return DDIM(self.steps).timesteps(schedule)

    def begin(self, x):
        return jnp.zeros_like(x), jnp.float32(jnp.nan)  # x_0 and log SNR / 2 of the last move

    def move(self, schedule, jump, x_t, x_0, noise, temperature, memory):
        a, s, a_to, s_to = jump.coefficients(schedule)
        before, lam_before = memory
        lam, lam_to = jnp.log(a / s), jnp.log(a_to / jnp.maximum(s_to, 1e-4))
        ratio = (lam - lam_before) / (lam_to - lam)
        blend = x_0 + jnp.where(jnp.isnan(ratio), 0, 1 / (2 * ratio)) * (x_0 - before)
        blend = jnp.where(jump.to < 0, x_0, blend)
        return s_to / s * x_t - a_to * jnp.expm1(lam - lam_to) * blend, (x_0, lam)


def test_a_sampler_of_ones_own_steers_too():
    """Its error falls faster than DDIM's, for the base and for a base that is made the expert."""
    base, expert = (
        mixture(3 + i, SCHEDULE, dimensions=2, components=1, apart=1.5) for i in (0, 1)
    )
    run = functools.partial(
        guided_sample, schedule=SCHEDULE, shape=(100, 2), key=jax.random.key(0)
    )
    exact = run(expert, options=GuidanceOptions(sampler="ddim"))  # 200 steps
    guide = ScoreDifference(base, expert)
    for sampler, error in ((DDIM(12), (0.02, 0.2)), (TwoStep(12), (0.0, 0.02))):
        options = GuidanceOptions(sampler=sampler)
        own, steered = run(expert, options=options), run(base, guide=guide, options=options)
        np.testing.assert_allclose(steered, own, atol=5e-3)
        assert error[0] < np.sqrt(np.mean(np.square(own - exact))) < error[1]
