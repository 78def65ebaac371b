"""A diffusion model as a callable that gives its score: a pytree, parameters its leaves.

A closure would bake the weights into the program, and compile anew for every model; a `Denoiser`
is an argument of jitted functions, as any array is.

A condition is any tree of arrays [B, ...]: labels, token embeddings and their mask, an image.
Legend: B batch; x_0 and x_t have any shape of a row.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree, Shaped

from common_jax import struct
from common_jax.errors import InputError
from common_jax.precision import precise
from reward_jax.diffusion.process import (
    Prediction,
    check_prediction,
    check_shape,
    convert,
    score_to_x0,
    x0_to_score,
)
from reward_jax.diffusion.schedule import Schedule, check_schedule

__all__ = [
    "ClassifierFree",
    "Condition",
    "Denoiser",
    "Score",
    "as_argument",
    "check_schedules",
    "check_score",
    "denoiser_of",
    "estimate_x0",
    "null_like",
    "score_and_x0",
    "score_from",
    "steps_of",
]


Condition = PyTree[Shaped[Array, "B ..."]]


class Score(Protocol):
    """(x_t, t[, cond]) -> grad log p_t(x_t), a model's or exact.

    cond: left out of the call where there is none.
    """

    def __call__(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None, /
    ) -> Float[Array, "B ..."]:
        """The score."""
        ...


@struct.dataclass
class Denoiser:
    """Model, parameters and schedule; calling it gives the score (see `Score`).

    model: a module with apply({"params": params}, x_t, t[, cond]) -> [B, ...] (static, hashable).
    prediction: what its output means. clip: its estimate of x_0 is clipped to [-clip, clip], as
    for data that is scaled to limits.
    """

    params: PyTree[Float[Array, "..."]]
    schedule: Schedule
    model: Any = struct.field(pytree_node=False)
    prediction: Prediction = struct.field(pytree_node=False)
    clip: float | None = struct.field(pytree_node=False, default=None)

    @precise
    def x0(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """The model's estimate of x_0, E[x_0 | x_t]; errors as `steps_of` and `check_shape`."""
        t = steps_of(x_t, t, self.schedule)
        given = () if cond is None else (cond,)
        output = self.model.apply({"params": self.params}, x_t, t, *given)
        check_shape(f"a denoiser ({type(self.model).__name__})", output, x_t)
        x_0 = convert(self.schedule, output, x_t, t, self.prediction, "x0")
        return x_0 if self.clip is None else jnp.clip(x_0, -self.clip, self.clip)

    def __call__(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """The score; errors as of `x0`."""
        t = steps_of(x_t, t, self.schedule)
        return x0_to_score(self.schedule, self.x0(x_t, t, cond), x_t, t)


def steps_of(
    x_t: Float[Array, "B ..."],
    t: Int[Array, " B"] | Int[Array, ""] | int,
    schedule: Schedule | None = None,
) -> Int[Array, " B"]:
    """The diffusion step of each row of x_t, where t may be one number for all.

    Raises InputError for x_t that are no floating numbers; for t that is none of whole numbers, or
    of another shape; and for a step that the schedule does not have, where it is known: not inside
    a compiled function.
    """
    if not isinstance(x_t, jax.Array | np.ndarray) or not x_t.ndim:
        raise InputError(
            f"x_t is a {type(x_t).__name__} of shape {np.shape(x_t)}: give an array [B, ...]"
        )
    if not jnp.issubdtype(jnp.result_type(x_t), jnp.floating):
        raise InputError(
            f"x_t is {jnp.result_type(x_t)}, not floating numbers: scale it as the model's data "
            "were, such as images to x / 127.5 - 1"
        )
    rows = jnp.shape(x_t)[:1]
    if not jnp.issubdtype(jnp.result_type(t), jnp.integer) or jnp.shape(t) not in ((), rows):
        raise InputError(
            f"t is {jnp.result_type(t)} of shape {list(jnp.shape(t))}: give a diffusion step, a "
            f"whole number, for each of the {rows[0] if rows else 0} rows of x_t, or one for all"
        )
    known = not isinstance(t, Tracer) and getattr(t, "is_fully_addressable", True)
    if schedule is not None and known and np.size(t):
        low, high = int(np.min(np.asarray(t))), int(np.max(np.asarray(t)))
        if low < 0 or high >= schedule.steps:
            raise InputError(
                f"t is {low if low < 0 else high}, where the schedule has the steps 0 to "
                f"{schedule.steps - 1}"
            )
    return jnp.broadcast_to(jnp.asarray(t), rows)


def check_score(what: str, score: Any) -> None:
    """Raise InputError for a score that cannot be called."""
    if not callable(score):
        raise InputError(
            f"{what} is a {type(score).__name__}: give a callable (x_t, t) -> [B, ...], such as "
            "`score_from` makes of a model"
        )


def check_schedules(schedule: Schedule, **of: Any) -> None:
    """Raise InputError where a score or a guide was made for another schedule than `schedule`.

    of: trees, by what they are called in the message; every schedule that stands in them counts.
    Schedules differ by their number of steps, or by abar (more than 1e-5), where that is known:
    not inside a compiled function.
    """
    check_schedule(schedule)
    for name, tree in of.items():
        for own in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Schedule)):
            if not isinstance(own, Schedule) or own is schedule:
                continue
            if own.steps != schedule.steps:
                raise InputError(
                    f"{name} has {own.steps} diffusion steps, the schedule {schedule.steps}; give "
                    "the schedule that the models were trained with"
                )
            both = own.alphas_cumprod, schedule.alphas_cumprod
            if any(isinstance(x, Tracer) for x in both):
                continue
            gap = float(np.abs(np.subtract(*map(np.asarray, both))).max())
            if gap > 1e-5:
                raise InputError(
                    f"{name} was made for another schedule ({own.name}; this is {schedule.name}, "
                    f"abar differs by up to {gap:.3f}); give the schedule that the models were "
                    "trained with"
                )


def score_from(
    model: Any,
    params: PyTree[Float[Array, "..."]],
    prediction: Prediction,
    schedule: Schedule,
    *,
    clip: float | None = None,
) -> Denoiser:
    """The score of a diffusion model that predicts "x0", "epsilon" or "v".

    model, clip: see `Denoiser`. schedule: the one that it was trained with. Raises InputError for
    another prediction.
    """
    check_prediction(prediction)
    return Denoiser(params, schedule, model, prediction, clip)


@struct.dataclass
class ClassifierFree:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, equation 6).

        s(x_t, t, null) + scale (s(x_t, t, cond) - s(x_t, t, null))

    so that scale 1 is the conditional score and 0 the unconditional one, to the last bit (the
    paper's w is scale - 1). One call of the model, with 2 B rows, gives both. A denoiser's
    estimates of x_0 are combined in the same way, before they are clipped.

    score: a conditional score, trained with `drop_condition`. null: the condition that stands for
    none, a tree like a condition, its arrays [...] or [B, ...]. scale: the guidance scale.
    """

    score: Any
    null: PyTree[Shaped[Array, "..."]]
    scale: float | Float[Array, ""] | Float[Array, " B"] = 1.0

    @property
    def clip(self) -> float | None:
        """The denoiser's bound of x_0; None where there is none."""
        return getattr(self.score, "clip", None)

    def x0(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """The guided estimate of x_0, for a score that has estimates of its own."""
        t = steps_of(x_t, t)
        if not isinstance(self.score, Denoiser):
            return self._both(self.score.x0, x_t, t, cond)
        free = self.score.replace(clip=None)  # pyright: ignore[reportAttributeAccessIssue]
        x_0 = self._both(free.x0, x_t, t, cond)
        return x_0 if self.clip is None else jnp.clip(x_0, -self.clip, self.clip)

    def __call__(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """The guided score; raises InputError without a condition, and as `steps_of`."""
        t = steps_of(x_t, t)
        if isinstance(self.score, Denoiser):
            return x0_to_score(self.score.schedule, self.x0(x_t, t, cond), x_t, t)
        return self._both(self.score, x_t, t, cond)

    def _both(
        self,
        evaluate: Any,
        x_t: Float[Array, "B ..."],
        t: Int[Array, " B"],
        cond: Condition | None,
    ) -> Float[Array, "B ..."]:
        if cond is None:
            raise InputError("classifier-free guidance needs a condition: give cond")
        null = null_like(self.null, cond)
        twice = jax.tree.map(lambda n, c: jnp.concatenate([n, c]), (x_t, t, null), (x_t, t, cond))
        without, given = jnp.split(check_shape("a score", evaluate(*twice), twice[0]), 2)
        scale = jnp.asarray(self.scale, x_t.dtype)
        scale = scale.reshape(scale.shape + (1,) * (x_t.ndim - 1) * scale.ndim)
        mixed = without + scale * (given - without)
        return jnp.where(scale == 1, given, jnp.where(scale == 0, without, mixed))


def null_like(null: PyTree[Shaped[Array, "..."]], cond: Condition) -> Condition:
    """The condition that stands for none, for as many rows; InputError where it does not fit."""
    try:
        return jax.tree.map(lambda c, n: jnp.broadcast_to(n, c.shape).astype(c.dtype), cond, null)
    except (TypeError, ValueError):
        shapes = (jax.tree.map(lambda x: list(jnp.shape(x)), x) for x in (null, cond))
        raise InputError(
            "null is {} where the condition is {}: give a tree like it, its arrays without the "
            "axis of rows".format(*shapes)
        ) from None


def denoiser_of(score: Any) -> Denoiser | None:
    """The denoiser that a score is or guides; None for another score."""
    score = score.score if isinstance(score, ClassifierFree) else score
    return score if isinstance(score, Denoiser) else None


def _has_x0(score: Any) -> bool:
    return hasattr(score.score if isinstance(score, ClassifierFree) else score, "x0")


def estimate_x0(
    score: Score,
    schedule: Schedule,
    x_t: Float[Array, "B ..."],
    t: Int[Array, " B"],
    cond: Condition | None = None,
) -> Float[Array, "B ..."]:
    """E[x_0 | x_t] by any score: a model's own estimate, or Tweedie's formula."""
    given = () if cond is None else (cond,)
    if _has_x0(score):
        x_0 = score.x0(x_t, t, *given)  # pyright: ignore[reportAttributeAccessIssue]
        return check_shape("a score's x0", x_0, x_t)
    value = check_shape("a score", score(x_t, t, *given), x_t)
    return score_to_x0(schedule, value, x_t, t)


def score_and_x0(
    score: Score,
    schedule: Schedule,
    x_t: Float[Array, "B ..."],
    t: Int[Array, " B"],
    cond: Condition | None = None,
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
    """The score and `estimate_x0`, from one run of the model where that gives both."""
    if own := denoiser_of(score):
        x_0 = estimate_x0(score, schedule, x_t, t, cond)
        return x0_to_score(own.schedule, x_0, x_t, t), x_0
    value = score(x_t, t) if cond is None else score(x_t, t, cond)
    check_shape("a score", value, x_t)
    if _has_x0(score):
        return value, estimate_x0(score, schedule, x_t, t, cond)
    return value, score_to_x0(schedule, value, x_t, t)


def as_argument(tree: PyTree[Any]) -> PyTree[Any]:
    """A callable, or a tree of some, as an argument of jit: functions are wrapped in `Partial`.

    Dataclasses of users' own are in `struct.Apart`.
    """
    wrapped = jax.tree.map(lambda x: jax.tree_util.Partial(x) if callable(x) else x, tree)
    return struct.apart(wrapped)
