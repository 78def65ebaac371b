"""A diffusion model as a callable that gives scores: parameters are leaves, never closed over.

Closures bake weights into the program, and compile anew for every model; a `Denoiser` is an
argument of jitted functions like any array.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from reward_jax.diffusion.process import (
    Prediction,
    check_prediction,
    convert,
    score_to_x0,
    x0_to_score,
)
from reward_jax.diffusion.schedule import Schedule

__all__ = ["Denoiser", "Score", "as_argument", "estimate_x0", "score_and_x0", "score_from"]


class Score(Protocol):
    """(x_t [B, ...], t [B] int[, cond]) -> grad log p_t(x_t) [B, ...]: a model's, or exact."""

    def __call__(self, x_t: jax.Array, t: jax.Array, cond: Any = None, /) -> jax.Array:
        """The score."""
        ...


@struct.dataclass
class Denoiser:
    """Model, parameters and schedule; calling it gives the score (see `Score`).

    model: a module with apply({"params": params}, x_t, t[, cond]) -> [B, ...] (static, hashable).
    clip: x_0 is cut to [-clip, clip], as for data that is scaled to limits.
    """

    params: Any
    schedule: Schedule
    model: Any = struct.field(pytree_node=False)
    prediction: Prediction = struct.field(pytree_node=False)
    clip: float | None = struct.field(pytree_node=False, default=None)

    def x0(self, x_t: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        """The model's estimate of x_0 [B, ...]."""
        given = () if cond is None else (cond,)
        output = self.model.apply({"params": self.params}, x_t, t, *given)
        x_0 = convert(self.schedule, output, x_t, t, self.prediction, "x0")
        return x_0 if self.clip is None else jnp.clip(x_0, -self.clip, self.clip)

    def __call__(self, x_t: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        """The score [B, ...]."""
        return x0_to_score(self.schedule, self.x0(x_t, t, cond), x_t, t)


def score_from(
    model: Any,
    params: Any,
    prediction: Prediction,
    schedule: Schedule,
    *,
    clip: float | None = None,
) -> Denoiser:
    """The score of a diffusion model that predicts "x0", "epsilon" or "v".

    model: see `Denoiser`. schedule: the one that it was trained with.
    """
    check_prediction(prediction)
    return Denoiser(params, schedule, model, prediction, clip)


def estimate_x0(
    score: Score, schedule: Schedule, x_t: jax.Array, t: jax.Array, cond: Any = None
) -> jax.Array:
    """E[x_0 | x_t] by any score: a model's own estimate, or Tweedie's formula."""
    given = () if cond is None else (cond,)
    if hasattr(score, "x0"):
        return score.x0(x_t, t, *given)  # pyright: ignore[reportAttributeAccessIssue]
    return score_to_x0(schedule, score(x_t, t, *given), x_t, t)


def score_and_x0(
    score: Score, schedule: Schedule, x_t: jax.Array, t: jax.Array, cond: Any = None
) -> tuple[jax.Array, jax.Array]:
    """The score and `estimate_x0`, of one run where one gives both."""
    if isinstance(score, Denoiser):
        x_0 = score.x0(x_t, t, cond)
        return x0_to_score(score.schedule, x_0, x_t, t), x_0
    value = score(x_t, t) if cond is None else score(x_t, t, cond)
    if hasattr(score, "x0"):
        return value, estimate_x0(score, schedule, x_t, t, cond)
    return value, score_to_x0(schedule, value, x_t, t)


def as_argument(tree: Any) -> Any:
    """A callable, or a tree that holds some, that jit takes as an argument: functions wrapped."""
    return jax.tree.map(lambda x: jax.tree_util.Partial(x) if callable(x) else x, tree)
