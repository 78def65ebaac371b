"""The diffusion process: noising, what a model predicts, its loss, one step back.

A model predicts x_0, the noise epsilon, or v = sqrt(abar) epsilon - sqrt(1 - abar) x_0; each gives
the others and the score s(x, t) = grad_x log p_t(x) = -epsilon / sqrt(1 - abar).

Legend: B batch; x_0, x_t [B, ...]; t [B] int, 0 .. T - 1. For trajectories ... is H, D: horizon
and transition width, actions first, then observations.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from common_jax.errors import InputError
from reward_jax.diffusion.schedule import Schedule

__all__ = [
    "FirstState",
    "Pinned",
    "Prediction",
    "action_weights",
    "check_prediction",
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


def draw_noise(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """`jax.random.normal` to the bit, drawn flat: three axes take XLA a second more to compile."""
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def q_sample(schedule: Schedule, x_0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t given x_0 and standard normal noise, both [B, ...]."""
    keep = schedule.at(schedule.sqrt_alphas_cumprod, t, x_0)
    add = schedule.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_0)
    return keep * x_0 + add * noise


def convert(
    schedule: Schedule,
    value: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    source: Prediction,
    target: Prediction,
) -> jax.Array:
    """A prediction as another one, e.g. v as x_0; all [B, ...]."""
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


def x0_to_score(schedule: Schedule, x_0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """(sqrt(abar) x_0 - x_t) / (1 - abar)."""
    a = schedule.at(schedule.sqrt_alphas_cumprod, t, x_t)
    s = schedule.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    return (a * x_0 - x_t) / (s * s)


def score_to_x0(schedule: Schedule, score: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """(x_t + (1 - abar) s) / sqrt(abar), Tweedie's formula."""
    a = schedule.at(schedule.sqrt_alphas_cumprod, t, x_t)
    s = schedule.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
    return (x_t + s * s * score) / a


def posterior_mean(schedule: Schedule, x_0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Mean of q(x_{t-1} | x_t, x_0); at t = 0 it is x_0."""
    of_x0 = schedule.at(schedule.posterior_x0, t, x_t)
    return of_x0 * x_0 + schedule.at(schedule.posterior_xt, t, x_t) * x_t


@struct.dataclass
class Pinned:
    """Entries of x_0 that are given: they are never noised, and imposed again after each move.

    mask: broadcastable to x, True where given. value: broadcastable to x; its other entries do
    not matter.
    """

    mask: Any
    value: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        """X with the given entries in their places."""
        return jnp.where(self.mask, self.value, x)

    def free(self, x: jax.Array) -> jax.Array:
        """X with zeros at the given entries: no gradient moves them."""
        return jnp.where(self.mask, 0, x)


@dataclasses.dataclass(frozen=True)
class FirstState:
    """x_0 [B, H, D] -> its first state, pinned; the first `actions` of D channels stay free."""

    actions: int = 0

    def __call__(self, x_0: jax.Array) -> Pinned:
        """The first observation of each trajectory."""
        return first_state(x_0[:, 0, self.actions :], x_0.shape[1], x_0.shape[2])


def first_state(observations: jax.Array, horizon: int, width: int) -> Pinned:
    """Trajectories [B, H, D] that start at observations [B, O] (the last O of D channels)."""
    channels = observations.shape[-1]
    mask = np.zeros((horizon, width), bool)
    mask[0, width - channels :] = True
    first = jnp.pad(observations, ((0, 0), (width - channels, 0)))
    return Pinned(jnp.asarray(mask), first[:, None])


def action_weights(horizon: int, width: int, actions: int, first: float) -> np.ndarray:
    """Loss weights [H, D]: `first` for the action that is executed, 1 for all else (Diffuser)."""
    weights = np.ones((horizon, width), np.float32)
    weights[0, :actions] = first
    return weights


def prediction_loss(
    schedule: Schedule,
    output: jax.Array,
    x_0: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    *,
    prediction: Prediction,
    weights: Any = 1.0,
    pinned: Pinned | None = None,
) -> jax.Array:
    """Mean squared error [B] of a model's output, in its own units, over all entries of x.

    weights: broadcastable to x. Pinned entries count as no error, as in Diffuser.
    """
    check_prediction(prediction)
    a = schedule.at(schedule.sqrt_alphas_cumprod, t, x_0)
    s = schedule.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_0)
    target = {"x0": x_0, "epsilon": noise, "v": a * noise - s * x_0}[prediction]
    error = jnp.square(output - target) * jnp.broadcast_to(weights, x_0.shape)
    if pinned is not None:
        error = pinned.free(error)
    return jnp.mean(error.reshape(error.shape[0], -1), axis=1)


def check_prediction(prediction: str) -> None:
    """InputError for what no model predicts."""
    if prediction not in get_args(Prediction):
        known = ", ".join(get_args(Prediction))
        raise InputError(f"prediction {prediction!r} is unknown; known are {known}")
