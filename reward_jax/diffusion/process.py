"""The diffusion process: noising, what a model predicts, its loss, the posterior mean.

A model predicts x_0, the noise epsilon, or v = sqrt(abar) epsilon - sqrt(1 - abar) x_0; each gives
the others and the score s(x, t) = grad_x log p_t(x) = -epsilon / sqrt(1 - abar).

Legend: B batch, T diffusion steps (t is 0 .. T - 1); x_0 and x_t have any shape of a row. Of
trajectories it is H, D: horizon and transition width (actions first, then observations); O
observation width.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from common_jax import struct
from common_jax.errors import InputError
from reward_jax.diffusion.schedule import Schedule

__all__ = [
    "FirstState",
    "Pinned",
    "Prediction",
    "action_weights",
    "check_prediction",
    "check_shape",
    "convert",
    "draw_noise",
    "first_state",
    "posterior_mean",
    "prediction_loss",
    "q_sample",
    "score_to_x0",
    "x0_to_score",
]

Prediction = Literal["x0", "epsilon", "v"]


def draw_noise(
    key: Key[Array, ""], shape: Sequence[int], dtype: Any = jnp.float32
) -> Float[Array, "..."]:
    """`jax.random.normal` to the bit, drawn flat: three axes take XLA a second more to compile."""
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def q_sample(
    schedule: Schedule,
    x_0: Float[Array, "B ..."],
    t: Int[Array, " B"],
    noise: Float[Array, "B ..."],
) -> Float[Array, "B ..."]:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; noise: standard normal."""
    keep = schedule.at(schedule.sqrt_alphas_cumprod, t, x_0)
    add = schedule.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_0)
    return keep * x_0 + add * noise


def convert(
    schedule: Schedule,
    value: Float[Array, "B ..."],
    x_t: Float[Array, "B ..."],
    t: Int[Array, " B"],
    source: Prediction,
    target: Prediction,
) -> Float[Array, "B ..."]:
    """A prediction as another one, e.g. v as x_0."""
    if source == target:
        return value
    a = schedule.at(schedule.sqrt_alphas_cumprod, t, x_t)
    s = schedule.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    if source == "v":
        return a * x_t - s * value if target == "x0" else s * x_t + a * value
    if source == "x0":
        noise = (x_t - a * value) / s
        return noise if target == "epsilon" else a * noise - s * value
    x_0 = (x_t - s * value) / a
    return x_0 if target == "x0" else a * value - s * x_0


def x0_to_score(
    schedule: Schedule, x_0: Float[Array, "B ..."], x_t: Float[Array, "B ..."], t: Int[Array, " B"]
) -> Float[Array, "B ..."]:
    """The score of an estimate of x_0: (sqrt(abar) x_0 - x_t) / (1 - abar)."""
    a = schedule.at(schedule.sqrt_alphas_cumprod, t, x_t)
    s = schedule.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    return (a * x_0 - x_t) / (s * s)


def score_to_x0(
    schedule: Schedule,
    score: Float[Array, "B ..."],
    x_t: Float[Array, "B ..."],
    t: Int[Array, " B"],
) -> Float[Array, "B ..."]:
    """E[x_0 | x_t] of a score by Tweedie's formula: (x_t + (1 - abar) s) / sqrt(abar)."""
    a = schedule.at(schedule.sqrt_alphas_cumprod, t, x_t)
    s = schedule.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    return (x_t + s * s * score) / a


def posterior_mean(
    schedule: Schedule, x_0: Float[Array, "B ..."], x_t: Float[Array, "B ..."], t: Int[Array, " B"]
) -> Float[Array, "B ..."]:
    """Mean of q(x_{t-1} | x_t, x_0); at t = 0 it is x_0."""
    of_x0 = schedule.at(schedule.posterior_x0, t, x_t)
    return of_x0 * x_0 + schedule.at(schedule.posterior_xt, t, x_t) * x_t


@struct.dataclass
class Pinned:
    """Entries of x_0 that are given, as in inpainting: never noised, imposed after each move.

    mask: broadcastable to x, True where given. value: broadcastable to x; its other entries do
    not matter.
    """

    mask: Bool[Array, "..."]
    value: Float[Array, "..."]

    def __call__(self, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Impose the given entries on x; raises InputError where they are of another shape."""
        return check_shape("a pin", jnp.where(self.mask, self.value, x), x)

    def free(self, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Set the given entries of x, such as a gradient, to zero; errors as of a call."""
        return check_shape("a pin", jnp.where(self.mask, 0, x), x)


@dataclasses.dataclass(frozen=True)
class FirstState:
    """x_0 -> its first observation, pinned; the first `actions` of D channels stay free."""

    actions: int = 0

    def __call__(self, x_0: Float[Array, "B H D"]) -> Pinned:
        """The first observation of each trajectory."""
        return first_state(x_0[:, 0, self.actions :], x_0.shape[1], x_0.shape[2])


def first_state(observations: Float[Array, "B O"], horizon: int, width: int) -> Pinned:
    """Trajectories that start at these observations (the last O of D channels), pinned there.

    horizon: H. width: D.
    """
    channels = observations.shape[-1]
    mask = np.zeros((horizon, width), bool)
    mask[0, width - channels :] = True
    first = jnp.pad(observations, ((0, 0), (width - channels, 0)))
    return Pinned(jnp.asarray(mask), first[:, None])


def action_weights(
    horizon: int, width: int, actions: int, first: float
) -> Float[np.ndarray, "H D"]:
    """Loss weights: `first` for the first action, which is executed, 1 for all else (Diffuser)."""
    weights = np.ones((horizon, width), np.float32)
    weights[0, :actions] = first
    return weights


def prediction_loss(
    schedule: Schedule,
    output: Float[Array, "B ..."],
    x_0: Float[Array, "B ..."],
    t: Int[Array, " B"],
    noise: Float[Array, "B ..."],
    *,
    prediction: Prediction,
    weights: float | Float[Array, "..."] | Float[np.ndarray, "..."] = 1.0,
    pinned: Pinned | None = None,
) -> Float[Array, " B"]:
    """Mean squared error of a model's output over all entries of x, in its prediction's units.

    weights: broadcastable to x. Pinned entries count as no error, as in Diffuser. Raises
    InputError for an output of another shape than x.
    """
    check_prediction(prediction)
    check_shape("a denoiser", output, x_0)
    a = schedule.at(schedule.sqrt_alphas_cumprod, t, x_0)
    s = schedule.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_0)
    target = {"x0": x_0, "epsilon": noise, "v": a * noise - s * x_0}[prediction]
    try:
        weights = jnp.broadcast_to(weights, x_0.shape)
    except ValueError:
        raise InputError(
            f"weights have shape {list(np.shape(weights))}, which does not fit x_0 of "
            f"{list(x_0.shape)}: give one for each entry of a row, or one for all"
        ) from None
    error = jnp.square(output - target) * weights
    if pinned is not None:
        error = pinned.free(error)
    return jnp.mean(error.reshape(error.shape[0], -1), axis=1)


def check_shape(
    what: str, output: Float[Array, "B ..."], x_t: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """What a network, a score or a guide gives, as it is.

    Raises InputError where it is not of the shape of x_t: it would be broadcast.
    """
    shape = getattr(output, "shape", None)
    if shape != x_t.shape:
        found = type(output).__name__ if shape is None else list(shape)
        raise InputError(
            f"{what} gives {found} for x_t of {list(x_t.shape)}: its output must have the shape "
            "of its input"
        )
    return output


def check_prediction(prediction: str) -> None:
    """Raise InputError, naming what is known, for another prediction."""
    if prediction not in get_args(Prediction):
        known = ", ".join(get_args(Prediction))
        raise InputError(f"prediction {prediction!r} is unknown; known are {known}")
