"""How much of the difference of two scores a learned reward explains, and why not the rest.

The target is split three ways: what the reward explains; a part that is no gradient field, which
no reward can explain (its Jacobian is not symmetric); and noise of fit, on which seeds disagree.

Data is x_0 [B, ...], or (x_0, condition) for conditional scores, as in `extract_reward`.
Legend: B batch, T diffusion steps, S seeds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from reward_jax.diffusion.denoiser import Score, as_argument, estimate_x0, score_and_x0
from reward_jax.diffusion.process import Pinned, draw_noise, posterior_mean, q_sample
from reward_jax.diffusion.schedule import Schedule
from reward_jax.reward.extract import RelativeReward
from reward_jax.reward.gradients import Guide
from reward_jax.reward.targets import GradientAt, check_gradient_at

Data = jax.Array | tuple[jax.Array, Any]

__all__ = ["antisymmetric_part", "explained_fraction", "seed_agreement"]


def explained_fraction(
    reward: Guide,
    base_score: Score,
    expert_score: Score,
    x_0: Data,
    schedule: Schedule,
    *,
    key: jax.Array,
    pin: Any = None,
    gradient_at: GradientAt = "x_t",
) -> jax.Array:
    """1 - |grad rho - (s_expert - s_base)|^2 / |s_expert - s_base|^2 at each t, [T].

    reward: or any guide. x_0: held-out data, noised to every t. 1 is all; 0 is what a constant
    reward explains.
    gradient_at: where grad rho is taken, as the reward was trained: x_t, or the base's posterior
    mean of x_{t-1}; the scores are those of x_t either way.
    With seeds in the reward, of the mean of their gradients.
    """
    check_gradient_at(gradient_at)
    both = _two(base_score, expert_score)
    return _explained(reward, *both, x_0, schedule, key, pin=pin, gradient_at=gradient_at)


@functools.partial(jax.jit, static_argnames=("pin", "gradient_at"))
def _explained(reward, base, expert, data, schedule, key, *, pin, gradient_at):
    x_0, cond = _split(data)

    def at(_: None, given: Any):
        x, t, pinned = _noised(x_0, schedule, pin, *given)
        of_base, estimate = score_and_x0(base, schedule, x, t, *cond)
        wanted = _free(pinned, expert(x, t, *cond) - of_base)
        place = x if gradient_at == "x_t" else posterior_mean(schedule, estimate, x, t)
        got = _free(pinned, reward.gradient(place, t, *cond))
        return None, 1 - jnp.sum(jnp.square(got - wanted)) / jnp.sum(jnp.square(wanted))

    return jax.lax.scan(at, None, _levels(schedule, key))[1]


def antisymmetric_part(
    base_score: Score,
    expert_score: Score,
    x_0: Data,
    schedule: Schedule,
    *,
    key: jax.Array,
    probes: int = 4,
    pin: Any = None,
) -> jax.Array:
    """Share of |J|_F^2 that is antisymmetric, J the Jacobian of s_expert - s_base, at each t [T].

    Hutchinson's estimate: with v standard normal, E |(J - J^T) v / 2|^2 over E |J v|^2, one
    product with J and one with its transpose a probe. 0 for a gradient field, at most 1; half
    where J is a matrix of noise.
    """
    both = _two(base_score, expert_score)
    return _antisymmetric(*both, x_0, schedule, key, probes=probes, pin=pin)


@functools.partial(jax.jit, static_argnames=("probes", "pin"))
def _antisymmetric(base, expert, data, schedule, key, *, probes: int, pin):
    x_0, cond = _split(data)

    def at(_: None, given: Any):
        t, noise = given
        x, levels, pinned = _noised(x_0, schedule, pin, t, noise)

        def difference(x: jax.Array) -> jax.Array:
            return _free(pinned, expert(x, levels, *cond) - base(x, levels, *cond))

        def probe(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            v = _free(pinned, draw_noise(key, x.shape))
            forward = jax.jvp(difference, (x,), (v,))[1]
            backward = _free(pinned, jax.vjp(difference, x)[1](v)[0])
            # |J v|^2 and |J^T v|^2 have one mean: both are used.
            size = (jnp.sum(jnp.square(forward)) + jnp.sum(jnp.square(backward))) / 2
            return jnp.sum(jnp.square(forward - backward)) / 4, size

        odd, all_ = jax.lax.map(probe, jax.random.split(jax.random.fold_in(noise, 1), probes))
        return None, jnp.sum(odd) / jnp.sum(all_)

    return jax.lax.scan(at, None, _levels(schedule, key))[1]


def seed_agreement(
    reward: RelativeReward,
    x_0: Data,
    *,
    key: jax.Array,
    pin: Any = None,
    base_score: Score | None = None,
) -> jax.Array:
    """Mean cosine between the gradients of two seeds at each t, [T]; 1 where seeds agree.

    reward: with two seeds or more. x_0: held-out data, noised to every t. base_score: where given,
    gradients are taken at its posterior mean of x_{t-1}, and not at x_t.
    """
    if reward.seeds is None or reward.seeds < 2:
        raise ValueError("agreement between seeds needs a reward of two seeds or more")
    base = None if base_score is None else as_argument(base_score)
    return _agreement(reward, base, x_0, key, pin=pin)


@functools.partial(jax.jit, static_argnames="pin")
def _agreement(reward: RelativeReward, base, data, key, *, pin):
    count, schedule = reward.seeds or 1, reward.schedule
    x_0, cond = _split(data)

    def at(_: None, given: Any):
        x, t, pinned = _noised(x_0, schedule, pin, *given)
        if base is not None:
            x = posterior_mean(schedule, estimate_x0(base, schedule, x, t, *cond), x, t)

        def gradient(params: Any) -> jax.Array:
            one = reward.replace(params=params, seeds=None)  # pyright: ignore[reportAttributeAccessIssue]
            return _free(pinned, one.gradient(x, t)).reshape(-1)

        flat = jax.vmap(gradient)(reward.params)
        flat = flat / jnp.linalg.norm(flat, axis=1, keepdims=True)
        return None, (jnp.sum(flat @ flat.T) - count) / (count * (count - 1))

    return jax.lax.scan(at, None, _levels(schedule, key))[1]


def _split(data: Data) -> tuple[jax.Array, tuple[Any, ...]]:
    """x_0, and the condition as what follows x_t and t in a call of a score."""
    return (data[0], data[1:]) if isinstance(data, tuple) else (data, ())


def _levels(schedule: Schedule, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.arange(schedule.steps), jax.random.split(key, schedule.steps)


def _noised(x_0, schedule, pin, level, key) -> tuple[jax.Array, jax.Array, Pinned | None]:
    t = jnp.full(x_0.shape[:1], level)
    x = q_sample(schedule, x_0, t, draw_noise(key, x_0.shape))
    pinned = pin(x_0) if pin else None
    return (pinned(x) if pinned else x), t, pinned


def _free(pinned: Pinned | None, x: jax.Array) -> jax.Array:
    return pinned.free(x) if pinned else x


def _two(base: Score, expert: Score) -> tuple[Any, Any]:
    return as_argument(base), as_argument(expert)
