"""Targets of a reward's gradient: draws of x_t, and the difference of two scores (Algorithm 1).

    target = u(t) (s_expert(x_t, t) - s_base(x_t, t))

u(t) is the target's unit: 1 for "score", sqrt(1 - abar_t) for "epsilon" (minus the difference of
the two noise predictions, of one size at every t), beta_t / sqrt(alpha_t) for "posterior_mean"
(the difference of the two means of x_{t-1}, the authors' choice).

The teachers are the two models. Three programs, each for several steps at once: drawing,
evaluating one teacher (two models of one network compile once, and their weights are never
copied), and the difference.

Legend: B batch, T diffusion steps, N draws; x_t has any shape of a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from common_jax import struct
from common_jax.checksum import checksum, program_checksum
from common_jax.cli.ranges import check_ranges
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
    score_and_x0,
)
from reward_jax.diffusion.loop import LoopOptions, check_applies, check_key, quick_jit
from reward_jax.diffusion.process import Pinned, draw_noise, posterior_mean, q_sample
from reward_jax.diffusion.scan import scan
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import Rows, as_source, example, source_checksum, split_batch

__all__ = [
    "Drawn",
    "ExtractionOptions",
    "Feed",
    "GradientAt",
    "Target",
    "TargetSettings",
    "Targets",
    "Teachers",
    "check_draws",
    "check_gradient_at",
    "draw_targets",
    "mean_square",
    "origin",
    "unit",
]

Target = Literal["epsilon", "score", "posterior_mean"]
GradientAt = Literal["x_t", "posterior_mean"]
_BYTES_AT_ONCE = 2**28


def unit(schedule: Schedule, target: Target) -> Float[Array, " T"]:
    """u(t): the factor by which the difference of scores becomes the target."""
    if target not in get_args(Target):
        raise InputError(f"target {target!r} is unknown; known are {', '.join(get_args(Target))}")
    if target == "score":
        return jnp.ones_like(schedule.betas)
    if target == "epsilon":
        return jnp.asarray(schedule.sqrt_one_minus_alphas_cumprod)
    return jnp.asarray(schedule.mean_per_score)


def check_gradient_at(place: str) -> None:
    """Raise InputError for another place than `GradientAt` names."""
    if place not in get_args(GradientAt):
        raise InputError(f"gradient_at is x_t or posterior_mean, not {place!r}")


@struct.dataclass
class Targets:
    """Draws of the target: at x and t, the reward's gradient should be `value`.

    target: its unit, by name. gradient_at: what x is: x_t, or the base's posterior mean.
    """

    x: Float[Array, "N ..."]
    t: Int[Array, " N"]
    value: Float[Array, "N ..."]
    target: Target = struct.field(pytree_node=False)
    gradient_at: GradientAt = struct.field(pytree_node=False, default="x_t")


class Drawn(NamedTuple):
    """Targets for `extract_reward`, and a checksum of what they were drawn from.

    A run that goes on is known by that, not by the targets' own bits: these are rounded otherwise
    on another number of devices.
    """

    targets: Targets
    origin: str


@dataclasses.dataclass(frozen=True)
class ExtractionOptions(LoopOptions):
    """How gradients are matched.

    Args:
        gradient_at: where grad r is taken: x_t, or the base's posterior mean, as the authors do.
        apart: each seed has rows of its own in a batch, of which there are as many times more;
            seeds that begin alike, as an energy's do, would else be one.
    """

    gradient_at: GradientAt = "x_t"
    apart: bool = False

    def __post_init__(self) -> None:
        check_gradient_at(self.gradient_at)


class TargetSettings(NamedTuple):
    """What the programs that draw targets depend on besides arrays; see `extract_reward`."""

    target: Target
    gradient_at: GradientAt
    pin: Callable[[Float[Array, "B ..."]], Pinned] | None
    batch_size: int
    mesh: Mesh | None


class Teachers:
    """Two scores and their schedule, evaluated for the targets of several steps at once."""

    def __init__(
        self, base: Score, expert: Score, schedule: Schedule, settings: TargetSettings
    ) -> None:
        check_schedules(schedule, base_score=base, expert_score=expert)
        check_score("base_score", base)
        check_score("expert_score", expert)
        self._base, self._expert = (
            sharding.place(as_argument(model), settings.mesh) for model in (base, expert)
        )
        self._schedule, self._settings = schedule, settings

    def targets(
        self, key: Key[Array, ""], source: Any, steps: Int[Array, " steps"], fed: Any
    ) -> Targets:
        """Targets of those steps, [steps, B, ...]; source, fed: as `Feed.take` gives them."""
        draws = _draw(self._schedule, key, source, steps, fed, settings=self._settings)
        return draws if isinstance(draws, Targets) else self._at(draws)

    def at(
        self,
        x_t: Float[Array, "steps B ..."],
        t: Int[Array, "steps B"],
        cond: Condition | None = None,
    ) -> Targets:
        """Targets at given points, [steps, B, ...]; cond: of rows [B, ...], the same each time."""
        cond = jax.tree.map(lambda c: jnp.broadcast_to(c[None], (len(x_t), *c.shape)), cond)
        return self._at(_Draws(x_t, t, cond))

    def _at(self, draws: "_Draws") -> Targets:
        scores = [
            _evaluate(model, self._schedule, draws, mesh=self._settings.mesh)
            for model in (self._base, self._expert)
        ]
        return _difference(self._schedule, draws, scores, settings=self._settings)

    def in_parts(
        self, key: Key[Array, ""], source: Any, steps: Int[Array, " steps"], fed: Any
    ) -> Iterator[Targets]:
        """`targets` of a few steps at a time, of which no more than `_BYTES_AT_ONCE` are held."""
        draws = _draw.eval_shape(self._schedule, key, source, steps, fed, settings=self._settings)
        held = sum(2 * x.size * x.dtype.itemsize for x in jax.tree.leaves(draws))
        # Parts of one size, so that each program is compiled once.
        fewest = min(len(steps), 1 + held // _BYTES_AT_ONCE)
        parts = next(n for n in range(fewest, len(steps) + 1) if len(steps) % n == 0)
        for part in np.split(np.arange(len(steps)), parts):
            fed_part = jax.tree.map(lambda x: x[part], fed)  # noqa: B023
            yield self.targets(key, source, steps[part], fed_part)

    def check(self, x_0: Float[Array, "B ..."], cond: Condition | None) -> None:
        """Raise InputError where a score cannot be called with rows like these."""
        given = self._schedule, x_0, jnp.zeros(x_0.shape[0], jnp.int32), cond
        for name, model in (("base_score", self._base), ("expert_score", self._expert)):
            what = f"{name} cannot be called with x_t of {list(x_0.shape)} and t"
            check_applies(what, score_and_x0, model, *given)

    def checksums(self, feed: "Feed") -> dict[str, str]:
        """Checksums of both models; none where targets are given, for these stand for them."""
        batch = feed.example()
        if isinstance(batch, Targets):
            return {}
        x_0, cond = split_batch(batch)
        given = self._schedule, x_0, jnp.zeros(x_0.shape[0], jnp.int32), cond
        return {
            name: checksum((program_checksum(score_and_x0, model, *given), jax.tree.leaves(model)))
            for name, model in (("base_score", self._base), ("expert_score", self._expert))
        }


class _Draws(NamedTuple):
    """The points at which the teachers are evaluated."""

    x_t: Float[Array, "B ..."]
    t: Int[Array, " B"]
    cond: Condition | None


@functools.partial(jit, static_argnames="settings")
def _draw(
    schedule: Schedule,
    key: Key[Array, ""],
    source: Any,
    steps: Int[Array, " steps"],
    fed: Any,
    *,
    settings: TargetSettings,
) -> _Draws | Targets:
    """Draws of each step, [steps, B, ...]; batches that are `Targets` already pass through."""

    def one(_: None, given: Any) -> tuple[None, _Draws | Targets]:
        step, batch = given
        for_rows, for_x_t = jax.random.split(jax.random.fold_in(key, step))
        if batch is None:
            batch = source.sample(for_rows, settings.batch_size)
        batch = constrain(batch, settings.mesh)
        if isinstance(batch, Targets):
            _check_unit(batch, settings)
            return None, batch
        x_0, cond = split_batch(batch)
        for_t, for_noise = jax.random.split(for_x_t)
        t = jax.random.randint(for_t, x_0.shape[:1], 0, schedule.steps)
        x_t = q_sample(schedule, x_0, t, draw_noise(for_noise, x_0.shape, x_0.dtype))
        return None, _Draws(settings.pin(x_0)(x_t) if settings.pin else x_t, t, cond)

    return jax.lax.scan(one, None, (steps, fed))[1]


@quick_jit(static_argnames="mesh")
def _evaluate(
    model: Any, schedule: Schedule, draws: _Draws, *, mesh: Mesh | None
) -> tuple[Float[Array, "steps B ..."], Float[Array, "steps B ..."]]:
    """One teacher's scores and estimates of x_0, a step at a time."""

    def one(given: _Draws) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
        whole = sharding.gathered(model, mesh)
        return score_and_x0(whole, schedule, given.x_t, given.t, given.cond)

    return scan(lambda _, given: (None, one(given)), None, draws)[1]


@functools.partial(jit, static_argnames="settings")
def _difference(
    schedule: Schedule, draws: _Draws, scores: Any, *, settings: TargetSettings
) -> Targets:
    (of_base, x_0), (of_expert, _) = scores

    def one(
        x_t: Float[Array, "B ..."],
        t: Int[Array, " B"],
        of_base: Float[Array, "B ..."],
        of_expert: Float[Array, "B ..."],
        x_0: Float[Array, "B ..."],
    ) -> Targets:
        at = x_t if settings.gradient_at == "x_t" else posterior_mean(schedule, x_0, x_t, t)
        difference = of_expert - of_base
        difference = settings.pin(x_t).free(difference) if settings.pin else difference
        value = schedule.at(unit(schedule, settings.target), t, x_t) * difference
        return Targets(at, t, value, settings.target, settings.gradient_at)

    return jax.lax.stop_gradient(jax.vmap(one)(draws.x_t, draws.t, of_base, of_expert, x_0))


def draw_targets(
    base_score: Score,
    expert_score: Score,
    batches: Any,
    schedule: Schedule,
    *,
    count: int,
    key: Key[Array, ""],
    target: Target = "epsilon",
    options: ExtractionOptions | None = None,
    pin: Callable[[Float[Array, "B ..."]], Pinned] | None = None,
    mesh: Mesh | None = None,
) -> Targets:
    """Targets of both teachers, for many rewards to be trained on; see `extract_reward`.

    batches: an array, (x_0, cond) or a source. count: how many, rounded up to whole batches.
    options: as of `extract_reward`; those of its loop are not used. mesh: batches are sharded over
    its data and fsdp axes. What the models give on the way is held for a part of the draws at a
    time. Ten parameters, as `extract_reward` has them.
    """
    check_draws(count, key)
    source = as_source(batches)
    o = ExtractionOptions() if options is None else options
    check_ranges(o)
    settings = TargetSettings(target, o.gradient_at, pin, o.batch_size, mesh)
    teachers = Teachers(base_score, expert_score, schedule, settings)
    steps = jnp.arange(-(-count // o.batch_size))
    found = list(teachers.in_parts(key, source, steps, None))
    return jax.tree.map(lambda *x: jnp.concatenate(x).reshape(-1, *x[0].shape[2:]), *found)


def origin(
    base_score: Score,
    expert_score: Score,
    batches: Any,
    schedule: Schedule,
    *,
    options: ExtractionOptions,
    others: Any = (),
) -> str:
    """A checksum of what targets are drawn from, for `Drawn`: both models, data and schedule.

    Arguments as of `draw_targets`. others: a tree of all else that they depend on.
    """
    settings = TargetSettings("score", options.gradient_at, None, options.batch_size, None)
    teachers = Teachers(base_score, expert_score, schedule, settings)
    feed = Feed(as_source(batches))
    size = options.batch_size
    return checksum((feed.checksums(size), teachers.checksums(feed), schedule, size, others))


def check_draws(count: Any, key: Any) -> None:
    """Raise InputError for no number of draws, or no key."""
    if not isinstance(count, int | np.integer) or isinstance(count, bool) or count < 1:
        raise InputError(f"count must be a whole number, 1 or more, not {count!r}")
    check_key(key)


def _check_unit(targets: Targets, settings: TargetSettings) -> None:
    """InputError where targets were drawn otherwise than a reward is to be matched to them."""
    for name in ("target", "gradient_at"):
        drawn, wanted = getattr(targets, name), getattr(settings, name)
        if drawn != wanted:
            raise InputError(
                f"batches: these targets were drawn with {name} {drawn!r}, not {wanted!r}: give "
                "the same, or draw them anew"
            )


class Feed:
    """Batches in any form that `extract_reward` takes, as (source, None) or (None, batches)."""

    def __init__(self, batches: Any) -> None:
        self._source = self._callable = self._iterator = self._first = None
        self._at = 0  # of an iterator, the next step
        self._origin: str | None = None
        if isinstance(batches, Drawn):
            batches, self._origin = batches
        if isinstance(batches, Targets):
            self._source = Rows(batches)
        elif hasattr(batches, "sample") or isinstance(batches, tuple | np.ndarray | jax.Array):
            self._source = as_source(batches)
        elif callable(batches):
            self._callable = batches
        elif isinstance(batches, Iterable):
            self._iterator: Iterator[Any] | None = iter(batches)
        else:
            raise InputError(
                f"batches: {type(batches).__name__} is no array, source, callable or iterable"
            )

    def example(self) -> Any:
        """A batch like those that are taken; of a callable or an iterable the first."""
        if self._source is None:
            return self._batch(0)
        return example(self._source)

    def checksums(self, count: int) -> dict[str, str]:
        """Of what targets were drawn from, or of what a source gives, `count` rows at a time.

        Else of the first batch.
        """
        if self._origin is not None:
            return {"drawn from (its checksum)": self._origin}
        if self._source is None:
            return {"data": checksum(self.example())}
        return {"data": source_checksum(self._source, count)}

    def peek(self) -> tuple[Any, Any]:
        """`take` for the first step, where it can be taken again; else raises InputError."""
        if self._iterator is not None:
            raise InputError("weighting: standardise needs an array, a source or a callable")
        return self.take(0, 1)

    def take(self, first: int, count: int) -> tuple[Any, Any]:
        """For steps first .. first + count - 1: a source, or their batches [count, B, ...]."""
        if self._source is not None:
            return self._source, None
        found = [self._batch(step) for step in range(first, first + count)]
        shapes = [jax.tree.map(jnp.shape, batch) for batch in found]
        for step, shape in enumerate(shapes, first + 1):
            if shape != shapes[0]:
                raise InputError(
                    f"batches: that of step {step} has the shape {shape}, that of step "
                    f"{first + 1} {shapes[0]}: give batches of one shape"
                )
        return None, jax.tree.map(lambda *x: jnp.stack(x), *found)

    def _batch(self, step: int) -> Any:
        """The batch of a step; the first is kept, so that it is asked for once."""
        if step == 0 and self._first is not None:
            return self._first
        batch = self._next(step) if self._callable is None else self._callable(step)
        if not isinstance(batch, Targets):
            split_batch(batch)
        if step == 0:
            self._first = batch
        return batch

    def _next(self, step: int) -> Any:
        assert self._iterator is not None
        if step < self._at:
            raise InputError("batches: an iterable that was used before")
        batch = None
        while self._at <= step:  # a resumed run skips what was used
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise InputError(
                    f"batches: the iterable ended before step {self._at + 1}; give one that is as "
                    "long as the steps, or an array to draw from"
                ) from None
            self._at += 1
        return batch


def mean_square(
    teachers: Teachers, schedule: Schedule, feed: Feed, key: Key[Array, ""], batch: int
) -> Float[Array, " T"]:
    """The target's mean square at each t, at least a thousandth of the mean of all."""
    source, fed = feed.peek()
    if source is None:
        source = Rows(jax.tree.map(lambda x: x[0], fed))
    rows = getattr(source, "rows", None)
    if isinstance(rows, Targets):
        parts: Iterable[Targets] = [rows]
    else:
        calls = jnp.arange(max(1, _DRAWS // batch)) + 2**30  # apart from the steps' draws
        parts = teachers.in_parts(key, source, calls, None)
    found = [(x.t.reshape(-1), _squares(x)) for x in parts]
    t, square = (jnp.concatenate(x) for x in zip(*found, strict=True))
    total, count = (
        jax.ops.segment_sum(x, t, schedule.steps) for x in (square, jnp.ones_like(square))
    )
    # Some 64 draws for each t, of its neighbours where its own are fewer.
    reach = min(64 * schedule.steps // t.size, schedule.steps - 1) // 2
    window = jnp.ones(2 * reach + 1)
    total, count = (jnp.convolve(x, window, mode="same") for x in (total, count))
    # At the last t the two models hardly differ: without a bound its weight would outweigh all.
    overall = jnp.mean(square)
    mean = jnp.where(count > 0, total / jnp.maximum(count, 1), overall)
    return jnp.maximum(mean, overall / 1000)


def _squares(targets: Targets) -> Float[Array, " N"]:
    """Mean square of each target."""
    return jnp.mean(jnp.square(targets.value).reshape(targets.t.size, -1), axis=1)


_DRAWS = 4096  # of a mean square at each t
