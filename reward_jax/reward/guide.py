"""Guided sampling: each step of the base model is steered by a guide, such as a relative reward.

With the ancestral sampler x_t climbs before the base is evaluated, as in Diffuser:

    for t = T - 1 .. 0:
        n_guide_steps times, where t >= t_stopgrad:   x <- x + scale * k(t) grad rho(x, t)
        x <- sample of q(x_{t-1} | x_t = x, x_0 = base's estimate)

How far scale 1 goes is k(t), the `Step`: "posterior_mean", beta_t / sqrt(alpha_t), moves as far as
the expert's mean lies from the base's, so that scale 1 samples like the expert where the reward is
exact; "variance" is the posterior variance; "score" is 1. The authors add the gradient of their
network, which was trained in units of the posterior mean, and may scale it by the variance: that
is "learned", and scale_by_variance.

With any other sampler, DDIM at any number of steps among them, the guide is added to the score
(Dhariwal and Nichol 2021, algorithm 2):

    score of the base + scale * k(t) sqrt(alpha_t) / beta_t * grad rho(x, t)

so that a scale means the same to both, and to any number of steps: with DDIM's eta 1 a move over
several diffusion steps goes as far as that many ancestral ones, with eta 0 half as far, which is
all that a move without noise makes of a score. At scale 1 of "posterior_mean" the factor is 1:
where the guide is exactly the difference of the two scores every move is the expert's own move,
whatever the number of steps, and what is off is what the sampler itself makes of few steps. Where
the base clips its estimate of x_0, the guided estimate is clipped, too.

Legend: B samples, T diffusion steps, S steps of the sampler.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common_jax.cli.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from common_jax.errors import InputError
from common_jax.mesh import constrain
from reward_jax.diffusion.denoiser import Score, as_argument, estimate_x0
from reward_jax.diffusion.process import Pinned, draw_noise
from reward_jax.diffusion.samplers import Jump, Sampler, SamplerName, make_sampler
from reward_jax.diffusion.schedule import Schedule
from reward_jax.reward.gradients import Guide

__all__ = ["GuidanceOptions", "Step", "guided_sample", "sweep"]

Step = Literal["posterior_mean", "variance", "score", "learned"]
if TYPE_CHECKING:
    Real = NonNegativeReal = float | jax.Array | np.ndarray
    Whole = int | jax.Array | np.ndarray
    AnySampler = SamplerName | Sampler
else:  # what a command line can give
    Real, NonNegativeReal, Whole, AnySampler = float, NonNegativeFloat, NonNegativeInt, SamplerName


@dataclasses.dataclass(frozen=True)
class GuidanceOptions:
    """How samples are drawn and steered; from Python, the numbers may be arrays, and traced.

    Another scale, t_stopgrad, temperature or eta compiles nothing anew.

    Args:
        scale: guidance scale, a number or [B]; 1 moves as far as the expert would (step
            posterior_mean), 0 gives the base's samples to the last bit.
        t_stopgrad: no guidance at diffusion steps below it; a number or [B].
        n_guide_steps: times that a sample climbs before each step.
        step: unit of the scale: posterior_mean, variance, score, or learned (the guide's own).
        scale_by_variance: times the posterior variance, too.
        temperature: standard deviation of the noise of each step; the paper has 1, Diffuser .5.
        sampler: ancestral, or ddim; from Python also a `Sampler` with settings of its own.
        sampling_steps: of ddim, at most the schedule's diffusion steps; all of them by default.
        eta: of ddim: 0 for no noise, 1 for that of the ancestral sampler.
    """

    scale: Real = 1.0
    t_stopgrad: Whole = 0
    n_guide_steps: PositiveInt = 1
    step: Step = "posterior_mean"
    scale_by_variance: bool = False
    temperature: NonNegativeReal = 1.0
    sampler: AnySampler = "ancestral"
    sampling_steps: PositiveInt | None = None
    eta: NonNegativeReal = 0.0

    def made_sampler(self) -> Sampler:
        """The sampler; InputError for options that fit none."""
        if not isinstance(self.sampler, Sampler):
            return make_sampler(self.sampler, self.sampling_steps, self.eta)
        if self.sampling_steps is not None:
            raise InputError("sampling_steps are the named samplers': this one has its own")
        return self.sampler


class _Static(NamedTuple):
    """What the compiled sampling depends on besides arrays."""

    shape: tuple[int, ...]
    n_guide_steps: int
    step: Step
    scale_by_variance: bool
    clip: float | None
    chain: bool
    mesh: Mesh | None


def guided_sample(
    base_score: Score,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    key: jax.Array,
    guide: Guide | None = None,
    options: GuidanceOptions | None = None,
    pinned: Pinned | None = None,
    cond: Any = None,
    chain: bool = False,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Samples of the base, steered by a guide.

    Args:
        base_score: see `Score`.
        schedule: of the base.
        shape: (B, ...) of the samples.
        key: of all noise; the noise does not depend on the guide.
        guide: a `RelativeReward`, a discriminator, a `ScoreDifference`, or a scalar by `Climbed`;
            None samples the base. It is not evaluated at steps at which it steers no row.
        options: how; by default `GuidanceOptions()`.
        pinned: what is given of x_0, imposed again after each move.
        cond: condition of a conditional base, a tree of [B, ...]; a guide is given it, too.
        chain: all x_t, [S + 1, B, ...], noise first, in place of the last.
        mesh: B is cut over its data and fsdp axes; the noise is that of one device.

    Ten parameters: what is sampled and how it comes back are no options of guidance.
    """
    o = options or GuidanceOptions()
    if o.step not in get_args(Step):
        raise InputError(f"step {o.step!r} is unknown; known are {', '.join(get_args(Step))}")
    if o.n_guide_steps < 1:
        raise InputError(f"n_guide_steps must be 1 or more, not {o.n_guide_steps}")
    if guide is not None and not isinstance(guide, Guide):
        raise InputError(
            f"{type(guide).__name__} is no guide, for it has no gradient(x_t, t, cond); a scalar "
            "(x_t, t) -> [B] becomes one by Climbed"
        )
    return _sample(
        as_argument(base_score),
        schedule,
        as_argument(guide),
        jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), o.made_sampler()),
        key,
        jnp.asarray(o.scale, jnp.float32),
        jnp.asarray(o.t_stopgrad, jnp.int32),
        jnp.asarray(o.temperature, jnp.float32),
        pinned,
        cond,
        static=_Static(
            tuple(shape),
            o.n_guide_steps,
            o.step,
            o.scale_by_variance,
            getattr(base_score, "clip", None),
            chain,
            mesh,
        ),
    )


def sweep(
    base_score: Score,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    key: jax.Array,
    guide: Guide,
    scales: Any,
    t_stopgrads: Any,
    options: GuidanceOptions | None = None,
    **given: Any,
) -> jax.Array:
    """Samples for every scale and t_stopgrad, [scales, t_stopgrads, B, ...], in one compiled call.

    All have the same noise. options: but for scale and t_stopgrad. given: as of `guided_sample`.
    """

    def one(scale: jax.Array, stop: jax.Array) -> jax.Array:
        now = dataclasses.replace(options or GuidanceOptions(), scale=scale, t_stopgrad=stop)
        return guided_sample(
            base_score, schedule, shape, key=key, guide=guide, options=now, **given
        )

    rows = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
    return rows(jnp.asarray(scales, jnp.float32), jnp.asarray(t_stopgrads, jnp.int32))


@functools.partial(jax.jit, static_argnames="static")
def _sample(
    base,
    schedule: Schedule,
    guide,
    sampler: Sampler,
    key,
    scale,
    t_stopgrad,
    temperature,
    pinned: Pinned | None,
    cond,
    *,
    static: _Static,
):
    shape = static.shape
    scale, t_stopgrad = (_for_rows(value, shape) for value in (scale, t_stopgrad))
    far = _how_far(schedule, static)

    def impose(x: jax.Array) -> jax.Array:
        return constrain(pinned(x) if pinned else x, static.mesh)

    def slope(x: jax.Array, t: jax.Array) -> jax.Array:
        own = getattr(guide, "learned_gradient", guide.gradient)
        return (own if static.step == "learned" else guide.gradient)(x, t, cond)

    def climb(x: jax.Array, t: jax.Array, level: jax.Array, on: jax.Array) -> jax.Array:
        """x_t, moved."""
        for _ in range(static.n_guide_steps):
            # A NaN of a gradient is not let in where there is no guidance.
            x = impose(jnp.where(on, x + scale * far[level] * slope(x, t), x))
        return x

    def added(x: jax.Array, t: jax.Array, jump: Jump, on: jax.Array) -> jax.Array:
        """What is added to the score of x_t."""
        a, _, a_to, _ = jump.coefficients(schedule)
        ratio = jnp.square(a / a_to)
        reach = (1 - ratio) / jnp.sqrt(ratio)  # what one of score does to the mean at jump.to
        factor = scale * far[jump.t] / schedule.mean_per_score[jump.t]
        total, place = jnp.zeros_like(x), x
        for again in range(static.n_guide_steps):
            if again:
                place = impose(x + reach * total)
            total = jnp.where(on, total + factor * slope(place, t), total)
        return total

    def move(carry: tuple[jax.Array, Any], given: tuple[Jump, jax.Array]):
        (x, memory), (jump, noise_key) = carry, given
        t = jnp.full(shape[:1], jump.t)
        on = (jump.t >= t_stopgrad) & (scale != 0)
        if guide is not None and sampler.climbs_first:
            x = jax.lax.cond(jnp.any(on), lambda x: climb(x, t, jump.t, on), lambda x: x, x)
        x_0 = estimate_x0(base, schedule, x, t, cond)
        if guide is not None and not sampler.climbs_first:
            a, s, *_ = jump.coefficients(schedule)
            more = jax.lax.cond(jnp.any(on), lambda x: added(x, t, jump, on), jnp.zeros_like, x)
            x_0 = x_0 + s * s / a * more  # Tweedie's formula
            x_0 = x_0 if static.clip is None else jnp.clip(x_0, -static.clip, static.clip)
        noise = draw_noise(noise_key, shape)
        x, memory = sampler.move(schedule, jump, x, x_0, noise, temperature, memory)
        x = impose(x)
        return (x, memory), x if static.chain else None

    cond = constrain(cond, static.mesh)
    first, rest = jax.random.split(key)
    x = impose(draw_noise(first, shape))
    levels = sampler.timesteps(schedule)
    jumps = Jump(levels, jnp.append(levels[1:], -1))
    keys = jax.random.split(rest, len(levels))
    (last, _), rows = jax.lax.scan(move, (x, sampler.begin(x)), (jumps, keys))
    return last if rows is None else jnp.concatenate([x[None], rows])


def _how_far(schedule: Schedule, static: _Static) -> jax.Array:
    """k(t), [T]."""
    far = {
        "posterior_mean": schedule.mean_per_score,
        "variance": schedule.posterior_variance,
    }.get(static.step, jnp.ones_like(schedule.betas))
    return far * schedule.posterior_variance if static.scale_by_variance else far


def _for_rows(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number as it is, [B] as [B, 1, ...]."""
    return jnp.reshape(value, value.shape + (1,) * (len(shape) - 1) * value.ndim)
