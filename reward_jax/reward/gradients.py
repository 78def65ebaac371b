"""What a sample is steered by: a direction for each x_t, in units of a score.

A guide has gradient(x_t, t, cond) -> [B, ...], at best the difference of two scores. A scalar that
is climbed becomes one by `Climbed`; `ScoreDifference` is the difference itself, which needs no
training: the baseline of every learned reward.

Legend: B batch; x_t [B, ...]; t [B] int.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

__all__ = ["Climbed", "Guide", "ScoreDifference", "gradient_of"]


@runtime_checkable
class Guide(Protocol):
    """What steers `guided_sample`; a pytree, so that it is an argument of compiled functions.

    One that was trained in a unit of its own has learned_gradient, too, with the same arguments:
    what step "learned" follows.
    """

    def gradient(self, x_t: jax.Array, t: jax.Array, cond: Any = None, /) -> jax.Array:
        """Where to, [B, ...], in units of a score; each row's depends on that row alone."""
        ...


def gradient_of(value: Callable[..., jax.Array], x_t: jax.Array, *given: Any) -> jax.Array:
    """grad_x of value(x_t, *given) [B], each row's own, [B, ...]."""
    return jax.grad(lambda x: jnp.sum(value(x, *given)))(x_t)


@struct.dataclass
class Climbed:
    """A guide made of a scalar: value(x_t, t[, cond]) -> [B], a pytree, such as a log density."""

    value: Any

    def gradient(self, x_t: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        """Of the value."""
        return gradient_of(self.value, x_t, t, *(() if cond is None else (cond,)))


@struct.dataclass
class ScoreDifference:
    """expert(x_t, t[, cond]) - base(x_t, t[, cond]): what a relative reward is trained to give.

    Scale 1 samples the expert, as far as one step can tell, at the price of evaluating both
    models; there is no reward that could be looked at, or carried over to another base.
    """

    base: Any
    expert: Any

    def gradient(self, x_t: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        """The difference itself; 0 where both are one model."""
        given = () if cond is None else (cond,)
        return self.expert(x_t, t, *given) - self.base(x_t, t, *given)
