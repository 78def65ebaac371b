"""A score in the terms of another normaliser than its model's own.

With x' = (x - offset) / scale a trajectory in the model's own terms, the noise of x_t is divided
by scale there, too: its ratio to the signal is not that of what the model saw at t. So the model
is asked at the step whose ratio that is, for x_0, and the score is made of its answer: what is
off in the step then weighs little.

Legend: B batch, H horizon, D transition width, T diffusion steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from reward_jax.data.trajectory.normalisers import Normaliser
from reward_jax.diffusion.denoiser import estimate_x0
from reward_jax.diffusion.process import Pinned, x0_to_score
from reward_jax.diffusion.schedule import Schedule

__all__ = ["Converted"]


@struct.dataclass
class Converted:
    """A score in other terms: x' = (x - offset) / scale, offset and scale [D].

    Asked at the two steps on both sides of the wanted ratio, steps [2, T], whose estimates of x_0
    are blended, share [T] of the second. Where scale is one for all dimensions what is left is the
    blend; else dimensions differ in noise, which no step has, and the geometric mean of scale is
    matched. pin: what is pinned in x_t is clean, and is told as such.
    """

    score: Any
    schedule: Schedule
    offset: Any
    scale: Any
    steps: Any
    share: Any
    pin: Callable[[jax.Array], Pinned] | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def between(
        cls,
        score: Any,
        schedule: Schedule,
        terms: Normaliser,
        pin: Callable[[jax.Array], Pinned] | None = None,
    ) -> "Converted":
        """terms: from those that are wanted to the score's own."""
        bar = np.asarray(schedule.alphas_cumprod, np.float64)
        log_ratio = np.log(bar) - np.log1p(-bar)  # signal to noise; falls with t
        own = log_ratio + 2 * np.log(np.asarray(terms.scale, np.float64)).mean()
        place = np.interp(-own, -log_ratio, np.arange(len(bar)))  # the ends where none is beyond
        low = np.floor(place).astype(np.int32)
        steps = np.stack([low, np.minimum(low + 1, len(bar) - 1)])
        share = jnp.asarray(place - low, jnp.float32)
        return cls(score, schedule, terms.offset, terms.scale, jnp.asarray(steps), share, pin)

    def x0(self, x_t: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        """E[x_0 | x_t] [B, H, D] in the wanted terms."""
        clean = (x_t - self.offset) / self.scale

        def asked(steps: jax.Array) -> jax.Array:
            step = steps[t]
            ratio = jnp.sqrt(self.schedule.alphas_cumprod)
            kept = self.schedule.at(ratio, step, x_t) / self.schedule.at(ratio, t, x_t)
            signal = self.schedule.at(ratio, step, x_t)
            own = (kept * x_t - signal * self.offset) / self.scale
            own = self.pin(clean)(own) if self.pin else own
            return estimate_x0(self.score, self.schedule, own, step, cond)

        share = self.schedule.at(self.share, t, x_t)
        found = (1 - share) * asked(self.steps[0]) + share * asked(self.steps[1])
        return found * self.scale + self.offset

    def __call__(self, x_t: jax.Array, t: jax.Array, cond: Any = None) -> jax.Array:
        """The score [B, H, D] with respect to x_t in the wanted terms."""
        return x0_to_score(self.schedule, self.x0(x_t, t, cond), x_t, t)
