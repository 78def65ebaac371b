"""Guided sampling: each step of the base model is steered by a guide, such as a relative reward.

With the ancestral sampler x_t moves along the gradient before the base is evaluated, as in
Diffuser:

    for t = T - 1 .. 0:
        n_guide_steps times, where t >= t_stopgrad:   x <- x + scale * k(t) grad rho(x, t)
        x <- sample of q(x_{t-1} | x_t = x, x_0 = base's estimate)

k(t), the `Step`, is the size of a step of guidance scale 1: "posterior_mean", beta_t /
sqrt(alpha_t), moves as far as the expert's mean lies from the base's, so that scale 1 samples like
the expert where the reward is exact; "variance" is the posterior variance; "score" is 1. The
authors add the gradient of their network, which was trained in units of the posterior mean, and
may scale it by the variance: that is "learned", and scale_by_variance.

With any other sampler, DDIM at any number of steps among them, the guide is added to the score
(Dhariwal and Nichol 2021, algorithm 2):

    score of the base + scale * k(t) sqrt(alpha_t) / beta_t * grad rho(x, t)

so that a scale means the same to both, and to any number of steps: with DDIM's eta 1 a move over
several diffusion steps goes as far as that many ancestral ones, with eta 0 half as far, as a score
moves a sample without noise. At scale 1 of "posterior_mean" the factor is 1: where the guide is
exactly the difference of the two scores every move is the expert's own, whatever the number of
steps, and only the sampler's own error of few steps is left. Where the base clips its estimate of
x_0, the guided estimate is clipped, too.

Legend: B samples, T diffusion steps, S steps of the sampler; x has any shape of a row.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, Shaped

from common_jax.cli.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    check_range,
)
from common_jax.errors import InputError
from common_jax.mesh import constrain
from common_jax.precision import jit
from reward_jax import sharding
from reward_jax.diffusion.denoiser import (
    Condition,
    Score,
    as_argument,
    check_schedules,
    check_score,
    estimate_x0,
)
from reward_jax.diffusion.loop import check_key
from reward_jax.diffusion.process import Pinned, check_shape, draw_noise, q_sample
from reward_jax.diffusion.samplers import Jump, Sampler, SamplerName, make_sampler
from reward_jax.diffusion.scan import scan
from reward_jax.diffusion.schedule import Schedule
from reward_jax.reward.gradients import Guide

__all__ = ["GuidanceOptions", "Step", "guided_sample", "sweep"]

Step = Literal["posterior_mean", "variance", "score", "learned"]
if TYPE_CHECKING:
    Real: TypeAlias = float | Float[Array, "..."] | Float[np.ndarray, "..."]
    NonNegativeReal: TypeAlias = Real
    Whole: TypeAlias = int | Int[Array, "..."] | Int[np.ndarray, "..."]
    AnySampler: TypeAlias = SamplerName | Sampler
else:  # what a command line can give
    Real, NonNegativeReal, Whole, AnySampler = float, NonNegativeFloat, NonNegativeInt, SamplerName


@dataclasses.dataclass(frozen=True)
class GuidanceOptions:
    """How samples are drawn and steered; from Python, the numbers may be arrays, also traced ones.

    A new value of scale, t_stopgrad, t_startgrad, temperature or eta does not recompile.

    Args:
        scale: guidance scale, a number or [B]; 1 moves as far as the expert would (step
            posterior_mean), 0 gives the base's samples to the last bit.
        t_stopgrad: no guidance at diffusion steps below it; a number or [B].
        n_guide_steps: gradient steps of guidance at each diffusion step.
        step: unit of the scale: posterior_mean, variance, score, or learned (the guide's own).
        scale_by_variance: multiply the step by the posterior variance, too.
        temperature: standard deviation of the noise of each step; the paper has 1, Diffuser .5.
        sampler: ancestral, or ddim; from Python also a `Sampler` with its own settings.
        sampling_steps: of ddim, at most the schedule's diffusion steps; all of them by default.
        eta: of ddim: 0 for no noise, 1 for that of the ancestral sampler.
        t_startgrad: no guidance at diffusion steps above it; a number or [B]; by default
            there is guidance from the first one on.
        skip: steps of the sampler that a warm start leaves out, the first ones.
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
    t_startgrad: Whole | None = None
    skip: NonNegativeInt = 0

    def made_sampler(self) -> Sampler:
        """The sampler; raises InputError for options that it does not have."""
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
    skip: int
    chain: bool
    mesh: Mesh | None


class _How(NamedTuple):
    """Options that are arrays, of which a new value does not recompile."""

    sampler: Sampler
    scale: Float[Array, "..."]
    t_stopgrad: Int[Array, "..."]
    t_startgrad: Int[Array, "..."]
    temperature: Float[Array, ""]


def guided_sample(
    base_score: Score,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    key: Key[Array, ""],
    guide: Guide | None = None,
    options: GuidanceOptions | None = None,
    pinned: Pinned | None = None,
    cond: Condition | None = None,
    warm: Float[Array, "B ..."] | None = None,
    chain: bool = False,
    mesh: Mesh | None = None,
) -> Float[Array, "B ..."] | Float[Array, "S+1 B ..."]:
    """Samples of the base, steered by a guide.

    Args:
        base_score: see `Score`.
        schedule: of the base.
        shape: (B, ...) of the samples.
        key: of all noise; the noise does not depend on the guide.
        guide: a `RelativeReward`, a discriminator, a `ScoreDifference` or a `ValueGuide`;
            None samples the base. It is not evaluated at steps at which it steers no row.
        options: by default `GuidanceOptions()`.
        pinned: entries of x_0 that are given, imposed again after each move.
        cond: condition of a conditional base, and of the guide.
        warm: estimates of x_0 to begin with, such as a last plan: noised to the diffusion step
            that follows the first `skip` steps of the sampler, and denoised from there.
        chain: return every x_t, noise first, and not the last alone.
        mesh: B is sharded over its data and fsdp axes; the noise is the same as on one device.

    Raises InputError for options that do not fit, and for a base or a guide that was made for
    another schedule. Eleven parameters: what is sampled, what it begins with, and what is
    returned, are no options of guidance.
    """
    o = GuidanceOptions() if options is None else options
    _check_options(o)
    if o.step not in get_args(Step):
        raise InputError(f"step {o.step!r} is unknown; known are {', '.join(get_args(Step))}")
    if guide is not None and not isinstance(guide, Guide):
        raise InputError(
            f"{type(guide).__name__} is no guide, for it has no gradient(x_t, t, cond); a scalar "
            "(x_t, t) -> [B] becomes one by ValueGuide"
        )
    check_key(key)
    check_score("base_score", base_score)
    whole = isinstance(shape, tuple | list) and all(isinstance(n, int | np.integer) for n in shape)
    if not (whole and shape and min(shape) > 0):
        raise InputError(f"shape is {shape}: give that of the samples, (B, ...), each 1 or more")
    check_schedules(schedule, base_score=base_score, guide=guide)
    _check_warm(warm, shape, o.skip)
    sampler = o.made_sampler()
    if warm is not None and o.skip >= (count := len(sampler.timesteps(schedule))):
        raise InputError(f"skip {o.skip} leaves none of the sampler's {count} steps: lower it")
    how = _How(
        jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), sampler),
        jnp.asarray(o.scale, jnp.float32),
        jnp.asarray(o.t_stopgrad, jnp.int32),
        jnp.asarray(schedule.steps if o.t_startgrad is None else o.t_startgrad, jnp.int32),
        jnp.asarray(o.temperature, jnp.float32),
    )
    return _sample(
        as_argument(base_score),
        schedule,
        as_argument(guide),
        how,
        key,
        pinned,
        cond,
        warm,
        static=_Static(
            tuple(shape),
            o.n_guide_steps,
            o.step,
            o.scale_by_variance,
            getattr(base_score, "clip", None),
            0 if warm is None else o.skip,
            chain,
            mesh,
        ),
    )


def _check_options(options: Any) -> None:
    """Raise InputError for a number beyond its range; arrays are not looked into."""
    if not isinstance(options, GuidanceOptions):
        raise InputError(f"options are {options!r}: give GuidanceOptions(...)")
    hints = get_type_hints(GuidanceOptions)
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), field.name
        named = name in (
            "step",
            "sampler",
            "sampling_steps",
        )  # these say themselves what they take
        if named or value is None or hasattr(value, "shape"):
            continue
        if name in ("scale", "temperature", "eta"):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, not {value!r}")
        check_range(hints[name], value, name)


def _check_warm(warm: Any, shape: tuple[int, ...], skip: int) -> None:
    if warm is None:
        if skip:
            raise InputError(f"skip {skip} is of a warm start: give warm, or leave skip out")
        return
    if not isinstance(warm, jax.Array | np.ndarray) or warm.shape != tuple(shape):
        found = getattr(warm, "shape", type(warm).__name__)
        raise InputError(f"warm has the shape {found}, the samples {tuple(shape)}")
    if not isinstance(warm, Tracer) and not np.isfinite(np.asarray(warm)).all():
        raise InputError("warm is not finite: give estimates of x_0")


def sweep(
    base_score: Score,
    schedule: Schedule,
    shape: tuple[int, ...],
    *,
    key: Key[Array, ""],
    guide: Guide,
    scales: Sequence[float] | Float[np.ndarray, " scales"],
    t_stopgrads: Sequence[int] | Int[np.ndarray, " t_stopgrads"],
    options: GuidanceOptions | None = None,
    **given: Any,
) -> Float[Array, "scales t_stopgrads B ..."]:
    """Samples for every scale and t_stopgrad, in one compiled call, all from the same noise.

    options: its scale and t_stopgrad are not used. given: other arguments of `guided_sample`.
    """

    def one(scale: Float[Array, ""], stop: Int[Array, ""]) -> Float[Array, "B ..."]:
        now = dataclasses.replace(options or GuidanceOptions(), scale=scale, t_stopgrad=stop)
        return guided_sample(
            base_score, schedule, shape, key=key, guide=guide, options=now, **given
        )

    rows = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))
    return rows(jnp.asarray(scales, jnp.float32), jnp.asarray(t_stopgrads, jnp.int32))


@functools.partial(jit, static_argnames="static")
def _sample(
    base: Any,
    schedule: Schedule,
    guide: Any,
    how: _How,
    key: Key[Array, ""],
    pinned: Pinned | None,
    cond: Condition | None,
    warm: Float[Array, "B ..."] | None,
    *,
    static: _Static,
) -> Float[Array, "B ..."] | Float[Array, "S+1 B ..."]:
    base, guide = sharding.gathered((base, guide), static.mesh)
    shape, sampler = static.shape, how.sampler
    cuts = how.scale, how.t_stopgrad, how.t_startgrad
    scale, t_stopgrad, t_startgrad = (_for_rows(value, shape) for value in cuts)
    sizes = _step_sizes(schedule, static)

    def impose(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        return constrain(pinned(x) if pinned else x, static.mesh)

    def gradient(x: Float[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, "B ..."]:
        own = getattr(guide, "learned_gradient", guide.gradient)
        found = (own if static.step == "learned" else guide.gradient)(x, t, cond)
        return check_shape("a guide", found, x)

    def ascend(
        x: Float[Array, "B ..."], t: Int[Array, " B"], level: Any, on: Any
    ) -> Float[Array, "B ..."]:
        """x_t, moved along the gradient."""
        for _ in range(static.n_guide_steps):
            # Selected, so that a gradient of NaN does no harm where there is no guidance.
            x = impose(jnp.where(on, x + scale * sizes[level] * gradient(x, t), x))
        return x

    def added(
        x: Float[Array, "B ..."], t: Int[Array, " B"], jump: Jump, on: Any
    ) -> Float[Array, "B ..."]:
        """What is added to the score at x_t."""
        a, _, a_to, _ = jump.coefficients(schedule)
        ratio = jnp.square(a / a_to)
        reach = (1 - ratio) / jnp.sqrt(ratio)  # how far a unit of score moves the mean at jump.to
        factor = scale * sizes[jump.t] / schedule.mean_per_score[jump.t]
        total, place = jnp.zeros_like(x), x
        for again in range(static.n_guide_steps):
            if again:
                place = impose(x + reach * total)
            total = jnp.where(on, total + factor * gradient(place, t), total)
        return total

    def move(carry: tuple[jax.Array, Any], given: tuple[Jump, jax.Array]):
        (x, memory), (jump, noise_key) = carry, given
        t = jnp.full(shape[:1], jump.t)
        on = (jump.t >= t_stopgrad) & (jump.t <= t_startgrad) & (scale != 0)
        if guide is not None and sampler.guides_first:
            x = jax.lax.cond(jnp.any(on), lambda x: ascend(x, t, jump.t, on), lambda x: x, x)
        x_0 = estimate_x0(base, schedule, x, t, cond)
        if guide is not None and not sampler.guides_first:
            a, s, *_ = jump.coefficients(schedule)
            more = jax.lax.cond(jnp.any(on), lambda x: added(x, t, jump, on), jnp.zeros_like, x)
            x_0 = x_0 + s * s / a * more  # Tweedie's formula
            x_0 = x_0 if static.clip is None else jnp.clip(x_0, -static.clip, static.clip)
        noise = draw_noise(noise_key, shape)
        x, memory = sampler.move(schedule, jump, x, x_0, noise, how.temperature, memory)
        x = impose(x)
        return (x, memory), x if static.chain else None

    cond = constrain(cond, static.mesh)
    first, rest = jax.random.split(key)
    x, levels = draw_noise(first, shape), sampler.timesteps(schedule)[static.skip :]
    if warm is not None:
        x = q_sample(schedule, warm, jnp.full(shape[:1], levels[0]), x)
    x = impose(x)
    jumps = Jump(levels, jnp.append(levels[1:], -1))
    keys = jax.random.split(rest, len(levels))
    (last, _), rows = scan(move, (x, sampler.begin(x)), (jumps, keys))
    return last if rows is None else jnp.concatenate([x[None], rows])


def _step_sizes(schedule: Schedule, static: _Static) -> Float[Array, " T"]:
    """k(t)."""
    sizes = {
        "posterior_mean": schedule.mean_per_score,
        "variance": schedule.posterior_variance,
    }.get(static.step, jnp.ones_like(schedule.betas))
    return sizes * schedule.posterior_variance if static.scale_by_variance else sizes


def _for_rows(value: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """A number as it is, [B] as [B, 1, ...]; InputError for another shape."""
    if value.shape not in ((), shape[:1]):
        raise InputError(
            f"scale or t_stopgrad has shape {list(value.shape)}: give a number, or one for each "
            f"of the {shape[0]} samples"
        )
    return jnp.reshape(value, value.shape + (1,) * (len(shape) - 1) * value.ndim)
