"""How much of the difference of two scores a learned reward explains, and why not the rest.

The target has three parts: what the reward explains; what is no gradient field (its Jacobian is
not symmetric), which no reward can explain; and error of the fit, in which seeds differ.

Data is x_0, or (x_0, condition) for conditional scores, as in `extract_reward`. All raise
InputError for data that are no floating numbers, and for models of another schedule than the one
that is given.
Legend: B batch, T diffusion steps; x_0 has any shape of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from reward_jax import sharding
from reward_jax.diffusion.denoiser import (
    Condition,
    Score,
    as_argument,
    check_schedules,
    estimate_x0,
    score_and_x0,
)
from reward_jax.diffusion.loop import quick_jit
from reward_jax.diffusion.process import Pinned, draw_noise, posterior_mean, q_sample
from reward_jax.diffusion.scan import scan
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import split_batch
from reward_jax.reward.gradients import Guide
from reward_jax.reward.relative import RelativeReward
from reward_jax.reward.targets import GradientAt, Targets, check_gradient_at, unit

Data = Float[Array, "B ..."] | tuple[Float[Array, "B ..."], Condition]

__all__ = ["antisymmetric_part", "explained_fraction", "explained_of", "seed_agreement"]


def explained_fraction(
    reward: Guide,
    base_score: Score,
    expert_score: Score,
    x_0: Data,
    schedule: Schedule,
    *,
    key: Key[Array, ""],
    pin: Any = None,
    gradient_at: GradientAt = "x_t",
) -> Float[Array, " T"]:
    """1 - |grad rho - (s_expert - s_base)|^2 / |s_expert - s_base|^2 at each t.

    1 is all; 0 is what a constant reward explains. Of a reward with seeds, their mean gradient is
    taken. reward: or any guide. x_0: held-out data, noised to every t. gradient_at: where grad rho
    is taken, as the reward was trained: x_t, or the base's posterior mean of x_{t-1}; the scores
    are those of x_t either way.
    """
    check_gradient_at(gradient_at)
    check_schedules(schedule, reward=reward, base_score=base_score, expert_score=expert_score)
    both = _two(base_score, expert_score)
    return _explained(reward, *both, x_0, schedule, key, pin=pin, gradient_at=gradient_at)


@quick_jit(static_argnames=("pin", "gradient_at"))
def _explained(
    reward: Guide,
    base: Any,
    expert: Any,
    data: Data,
    schedule: Schedule,
    key: Key[Array, ""],
    *,
    pin: Any,
    gradient_at: GradientAt,
) -> Float[Array, " T"]:
    reward, base, expert = sharding.in_use((reward, base, expert))
    x_0, cond = _split(data)

    def at(_: None, given: Any):
        x, t, pinned = _noised(x_0, schedule, pin, *given)
        of_base, estimate = score_and_x0(base, schedule, x, t, *cond)
        target = _free(pinned, expert(x, t, *cond) - of_base)
        place = x if gradient_at == "x_t" else posterior_mean(schedule, estimate, x, t)
        got = _free(pinned, reward.gradient(place, t, *cond))
        return None, 1 - jnp.sum(jnp.square(got - target)) / jnp.sum(jnp.square(target))

    return scan(at, None, _levels(schedule, key))[1]


def explained_of(
    reward: Guide, targets: Targets, schedule: Schedule, *, pin: Any = None, batch: int = 1024
) -> Float[Array, " T"]:
    """`explained_fraction` at targets that were drawn, such as those on guided paths, by their t.

    pin: as the targets were drawn with. NaN at a t that no target has. batch: rows at a time.
    """
    check_schedules(schedule, reward=reward)
    totals = jnp.zeros((2, schedule.steps))
    for first in range(0, len(targets.t), batch):
        part = jax.tree.map(lambda x: x[first : first + batch], targets)  # noqa: B023
        totals = totals + _squares_by_t(reward, part, schedule, pin=pin)
    error, size = totals
    return jnp.where(size > 0, 1 - error / size, jnp.nan)


@quick_jit(static_argnames="pin")
def _squares_by_t(
    reward: Guide, targets: Targets, schedule: Schedule, *, pin: Any
) -> Float[Array, "2 T"]:
    reward = sharding.in_use(reward)
    factor = schedule.at(unit(schedule, targets.target), targets.t, targets.x)
    pinned = pin(targets.x) if pin else None
    got = _free(pinned, factor * reward.gradient(targets.x, targets.t))
    rows = [
        jnp.square(x).reshape(len(targets.t), -1).sum(1)
        for x in (got - targets.value, targets.value)
    ]
    return jnp.stack([jax.ops.segment_sum(x, targets.t, schedule.steps) for x in rows])


def antisymmetric_part(
    base_score: Score,
    expert_score: Score,
    x_0: Data,
    schedule: Schedule,
    *,
    key: Key[Array, ""],
    probes: int = 4,
    pin: Any = None,
) -> Float[Array, " T"]:
    """Share of |J|_F^2 that is antisymmetric, J the Jacobian of s_expert - s_base, at each t.

    Hutchinson's estimate: with v standard normal, E |(J - J^T) v / 2|^2 over E |J v|^2, for each
    of `probes` one product with J and one with its transpose. 0 for a gradient field, 1 at most;
    one half for a J of independent normal entries.
    """
    check_schedules(schedule, base_score=base_score, expert_score=expert_score)
    both = _two(base_score, expert_score)
    return _antisymmetric(*both, x_0, schedule, key, probes=probes, pin=pin)


@quick_jit(static_argnames=("probes", "pin"))
def _antisymmetric(
    base: Any,
    expert: Any,
    data: Data,
    schedule: Schedule,
    key: Key[Array, ""],
    *,
    probes: int,
    pin: Any,
) -> Float[Array, " T"]:
    base, expert = sharding.in_use((base, expert))
    x_0, cond = _split(data)

    def at(_: None, given: Any):
        t, noise = given
        x, levels, pinned = _noised(x_0, schedule, pin, t, noise)

        def difference(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
            return _free(pinned, expert(x, levels, *cond) - base(x, levels, *cond))

        def probe(key: Key[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
            v = _free(pinned, draw_noise(key, x.shape))
            forward = jax.jvp(difference, (x,), (v,))[1]
            backward = _free(pinned, jax.vjp(difference, x)[1](v)[0])
            # |J v|^2 and |J^T v|^2 have one mean: both are used.
            size = (jnp.sum(jnp.square(forward)) + jnp.sum(jnp.square(backward))) / 2
            return jnp.sum(jnp.square(forward - backward)) / 4, size

        odd, all_ = jax.lax.map(probe, jax.random.split(jax.random.fold_in(noise, 1), probes))
        return None, jnp.sum(odd) / jnp.sum(all_)

    return scan(at, None, _levels(schedule, key))[1]


def seed_agreement(
    reward: RelativeReward,
    x_0: Data,
    *,
    key: Key[Array, ""],
    pin: Any = None,
    base_score: Score | None = None,
) -> Float[Array, " T"]:
    """Mean cosine between the gradients of two seeds at each t; 1 where seeds agree.

    reward: with two seeds or more. x_0: held-out data, noised to every t. base_score: where given,
    gradients are taken at its posterior mean of x_{t-1}, and not at x_t.
    """
    if reward.seeds is None or reward.seeds < 2:
        raise ValueError("agreement between seeds needs a reward of two seeds or more")
    check_schedules(reward.schedule, base_score=base_score)
    base = None if base_score is None else as_argument(base_score)
    return _agreement(reward, base, x_0, key, pin=pin)


@quick_jit(static_argnames="pin")
def _agreement(
    reward: RelativeReward, base: Any, data: Data, key: Key[Array, ""], *, pin: Any
) -> Float[Array, " T"]:
    reward, base = sharding.in_use((reward, base))
    count, schedule = reward.seeds or 1, reward.schedule
    x_0, cond = _split(data)

    def at(_: None, given: Any):
        x, t, pinned = _noised(x_0, schedule, pin, *given)
        if base is not None:
            x = posterior_mean(schedule, estimate_x0(base, schedule, x, t, *cond), x, t)

        def gradient(params: Any) -> Float[Array, " n"]:
            one = reward.replace(params=params, seeds=None)  # pyright: ignore[reportAttributeAccessIssue]
            return _free(pinned, one.gradient(x, t)).reshape(-1)

        flat = jax.vmap(gradient)(reward.params)
        flat = flat / jnp.linalg.norm(flat, axis=1, keepdims=True)
        return None, (jnp.sum(flat @ flat.T) - count) / (count * (count - 1))

    return scan(at, None, _levels(schedule, key))[1]


def _split(data: Data) -> tuple[Float[Array, "B ..."], tuple[Any, ...]]:
    """x_0, and the arguments of a score after x_t and t."""
    x_0, cond = split_batch(data)
    return x_0, (() if cond is None else (cond,))


def _levels(schedule: Schedule, key: Key[Array, ""]) -> tuple[Int[Array, " T"], Key[Array, " T"]]:
    return jnp.arange(schedule.steps), jax.random.split(key, schedule.steps)


def _noised(
    x_0: Float[Array, "B ..."],
    schedule: Schedule,
    pin: Any,
    level: Int[Array, ""],
    key: Key[Array, ""],
) -> tuple[Float[Array, "B ..."], Int[Array, " B"], Pinned | None]:
    t = jnp.full(x_0.shape[:1], level)
    x = q_sample(schedule, x_0, t, draw_noise(key, x_0.shape))
    pinned = pin(x_0) if pin else None
    return (pinned(x) if pinned else x), t, pinned


def _free(pinned: Pinned | None, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    return pinned.free(x) if pinned else x


def _two(base: Score, expert: Score) -> tuple[Any, Any]:
    return as_argument(base), as_argument(expert)
