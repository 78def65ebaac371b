"""Guides of sampling: a gradient at each x_t, in units of a score.

The best guide is the difference of two scores. `ValueGuide` makes a guide of a scalar function;
`ScoreDifference` is the difference itself, which needs no training: the baseline of every learned
reward. `SteeredScore` makes a score of a guide, and so an expert.

Legend: B batch; x_t has any shape of a row.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from common_jax import struct
from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import Condition
from reward_jax.diffusion.process import check_shape

__all__ = [
    "Guide",
    "ScoreDifference",
    "SteeredScore",
    "ValueGuide",
    "gradient_of",
    "one_a_row",
]


@runtime_checkable
class Guide(Protocol):
    """A guide of `guided_sample`; a pytree, so that it is an argument of compiled functions.

    One that was trained in a unit of its own has `learned_gradient`, too, with the same arguments,
    which guidance with step "learned" uses.
    """

    def gradient(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None, /
    ) -> Float[Array, "B ..."]:
        """The direction, in units of a score; each row's depends on that row alone."""
        ...


def gradient_of(
    value: Callable[..., Float[Array, " B"]], x_t: Float[Array, "B ..."], *given: Any
) -> Float[Array, "B ..."]:
    """grad_x of value(x_t, *given), each row's own; errors as `one_a_row`."""
    return jax.grad(lambda x: jnp.sum(one_a_row(value(x, *given), x)))(x_t)


def one_a_row(value: Float[Array, " B"], x_t: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """The value as it is; raises InputError where it is not one number for each row of x_t."""
    shape = getattr(value, "shape", None)
    if shape != x_t.shape[:1]:
        found = type(value).__name__ if shape is None else list(shape)
        raise InputError(
            f"a reward gives {found} for x_t of {list(x_t.shape)}: it must be one "
            f"number a row, [{x_t.shape[0]}]; sum or squeeze its other axes"
        )
    return value


@struct.dataclass
class ValueGuide:
    """The gradient of a scalar as a guide, as in Diffuser.

    value: (x_t, t[, cond]) -> [B], a pytree, such as a log density or a value function.
    """

    value: Any

    def gradient(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """grad_x of the value."""
        return gradient_of(self.value, x_t, t, *(() if cond is None else (cond,)))


@struct.dataclass
class ScoreDifference:
    """expert(x_t, t[, cond]) - base(x_t, t[, cond]): the target that a reward is trained on.

    Scale 1 samples the expert, up to the error of a step, at the price of evaluating both models;
    there is no reward that could be looked at, or used with another base.
    """

    base: Any
    expert: Any

    def gradient(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """The difference, 0 where both are one model; InputError where one has another shape."""
        given = () if cond is None else (cond,)
        expert, base = (
            check_shape(f"the {name}'s score", score(x_t, t, *given), x_t)
            for name, score in (("expert", self.expert), ("base", self.base))
        )
        return expert - base


@struct.dataclass
class SteeredScore:
    """base(x_t, t[, cond]) + the guide's gradient: the score that guidance of scale 1 follows.

    As the expert of `extract_reward` it distils the guide, such as a dear reward, into a reward
    of another network.
    """

    base: Any
    guide: Guide

    def __call__(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """The steered score; InputError where base or guide has another shape than x_t."""
        given = () if cond is None else (cond,)
        base = check_shape("the base's score", self.base(x_t, t, *given), x_t)
        return base + check_shape("the guide's gradient", self.guide.gradient(x_t, t, cond), x_t)
