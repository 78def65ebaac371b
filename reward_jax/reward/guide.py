"""Guided sampling: before each step of the base model, climb the reward.

    for t = T - 1 .. 0:
        n_guide_steps times, where t >= t_stopgrad:   x <- x + scale * k(t) grad_x rho(x, t)
        x <- sample of q(x_{t-1} | x_t = x, x_0 = base's estimate)

Classifier guidance (Dhariwal and Nichol 2021) with the relative reward in the classifier's place.
How far scale 1 goes is k(t), the `Step`: "posterior_mean", beta_t / sqrt(alpha_t), moves as far as
the expert's mean lies from the base's, so that scale 1 samples like the expert where the reward is
exact; "variance" is the posterior variance; "score" is 1. The authors add the gradient of their
network, which was trained in units of the posterior mean, and may scale it by the variance: that
is "learned", and scale_by_variance.

Legend: B trajectories, T diffusion steps.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from common_jax.errors import InputError
from common_jax.mesh import constrain
from reward_jax.diffusion.denoiser import Score, as_argument, estimate_x0
from reward_jax.diffusion.process import Pinned, draw_noise, posterior_mean
from reward_jax.diffusion.schedule import Schedule

__all__ = ["Step", "guided_sample", "sweep"]

Step = Literal["posterior_mean", "variance", "score", "learned"]


def guided_sample(
    base_score: Score,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    key: jax.Array,
    reward: Any = None,
    scale: Any = 1.0,
    t_stopgrad: Any = 0,
    n_guide_steps: int = 1,
    step: Step = "posterior_mean",
    scale_by_variance: bool = False,
    pinned: Pinned | None = None,
    cond: Any = None,
    temperature: Any = 1.0,
    chain: bool = False,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Samples of the base, steered by a reward.

    Args:
        base_score: see `Score`.
        schedule: of the base.
        shape: (B, ...) of the samples.
        key: of all noise; the noise does not depend on the guide.
        reward: a pytree, (x_t, t) -> rho [B], such as `RelativeReward` or a discriminator's logit;
            None samples the base. Scale 0 gives the base's samples to the last bit.
        scale: guidance scale, a number or [B]; an array, so that it may be swept.
        t_stopgrad: no guidance at t below it.
        n_guide_steps: times that x climbs before each step.
        step: how far scale 1 goes. "learned" takes reward.learned, the network's own output.
        scale_by_variance: times the posterior variance, too.
        pinned: what is given of x_0, imposed again after each move.
        cond: condition of a conditional base.
        temperature: standard deviation of the noise of each step; the paper has 1, Diffuser .5.
        chain: all x_t, [T + 1, B, ...], noise first, in place of the last.
        mesh: B is cut over its data and fsdp axes; the noise is that of one device.
    """
    if step not in get_args(Step):
        raise InputError(f"step {step!r} is unknown; known are {', '.join(get_args(Step))}")
    if n_guide_steps < 1:
        raise InputError(f"n_guide_steps must be 1 or more, not {n_guide_steps}")
    return _sample(
        as_argument(base_score),
        schedule,
        None if reward is None else as_argument(reward),
        key,
        jnp.asarray(scale, jnp.float32),
        jnp.asarray(t_stopgrad, jnp.int32),
        pinned,
        cond,
        jnp.asarray(temperature, jnp.float32),
        shape=tuple(shape),
        n_guide_steps=n_guide_steps,
        step=step,
        scale_by_variance=scale_by_variance,
        chain=chain,
        mesh=mesh,
    )


def sweep(
    base_score: Score,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    key: jax.Array,
    reward: Any,
    scales: Any,
    t_stopgrads: Any,
    **options: Any,
) -> jax.Array:
    """Samples for every scale and t_stopgrad, [scales, t_stopgrads, B, ...], in one compiled call.

    All have the same noise. options: as of `guided_sample`.
    """

    def one(scale: jax.Array, stop: jax.Array) -> jax.Array:
        return guided_sample(
            base_score,
            schedule,
            shape,
            key=key,
            reward=reward,
            scale=scale,
            t_stopgrad=stop,
            **options,
        )

    rows = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
    return rows(jnp.asarray(scales, jnp.float32), jnp.asarray(t_stopgrads, jnp.int32))


@functools.partial(
    jax.jit,
    static_argnames=("shape", "n_guide_steps", "step", "scale_by_variance", "chain", "mesh"),
)
def _sample(
    base,
    schedule: Schedule,
    reward,
    key,
    scale,
    t_stopgrad,
    pinned: Pinned | None,
    cond,
    temperature,
    *,
    shape: tuple[int, ...],
    n_guide_steps: int,
    step: Step,
    scale_by_variance: bool,
    chain: bool,
    mesh: Mesh | None,
):
    scale = jnp.reshape(scale, scale.shape + (1,) * (len(shape) - scale.ndim) * (scale.ndim > 0))

    def impose(x: jax.Array) -> jax.Array:
        return constrain(pinned(x) if pinned else x, mesh)

    def climb(x: jax.Array, t: jax.Array, level: jax.Array) -> jax.Array:
        value = reward.learned if step == "learned" else reward
        gradient = jax.grad(lambda x: jnp.sum(value(x, t)))(x)
        far = {
            "posterior_mean": schedule.mean_per_score,
            "variance": schedule.posterior_variance,
        }.get(step, jnp.ones_like(schedule.betas))
        if scale_by_variance:
            far = far * schedule.posterior_variance
        # No gradient is asked for, and a NaN of one is not let in, where there is no guidance.
        on = (level >= t_stopgrad) & (scale != 0)
        return impose(jnp.where(on, x + scale * far[level] * gradient, x))

    def back(x: jax.Array, given: tuple[jax.Array, jax.Array]):
        level, noise_key = given
        t = jnp.full(shape[:1], level)
        if reward is not None:
            for _ in range(n_guide_steps):
                x = climb(x, t, level)
        x_0 = estimate_x0(base, schedule, x, t, cond)
        mean = posterior_mean(schedule, x_0, x, t)
        spread = temperature * jnp.sqrt(schedule.posterior_variance[level])  # 0 at t = 0
        x = impose(mean + spread * draw_noise(noise_key, shape))
        return x, x if chain else None

    first, rest = jax.random.split(key)
    x = impose(draw_noise(first, shape))
    levels = jnp.arange(schedule.steps - 1, -1, -1)
    last, rows = jax.lax.scan(back, x, (levels, jax.random.split(rest, schedule.steps)))
    return last if rows is None else jnp.concatenate([x[None], rows])
