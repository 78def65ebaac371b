"""A score in the coordinates of another normaliser than its model's own.

With x' = (x - offset) / scale a trajectory in the model's own coordinates, the noise of x_t is
divided by scale there, too: its signal-to-noise ratio is not the one that the model saw at t. So
the model is evaluated for x_0 at the step that has this ratio, and the score is computed from its
x_0, on which a small error in the step has little effect.

Legend: B batch, H horizon, D transition width, T diffusion steps.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common_jax import struct
from common_jax.errors import InputError
from reward_jax.data.trajectory.normalisers import Normaliser, on_last
from reward_jax.data.trajectory.space import TrajectoryModel, check_same_space
from reward_jax.diffusion.denoiser import Condition, Score, estimate_x0
from reward_jax.diffusion.process import Pinned, x0_to_score
from reward_jax.diffusion.schedule import Schedule, check_same_schedule

__all__ = ["Converted", "expert_in_base_coordinates"]


@struct.dataclass
class Converted:
    """A score in other coordinates: the model's own are x' = (x - offset) / scale.

    The model is evaluated at the two steps on both sides of the ratio that x_t has at t, and the
    estimates of x_0 are interpolated, with weight `share` for the second. Where scale is the same
    in all dimensions, interpolation is the only error; else dimensions differ in noise, as at no
    step of the model, and the geometric mean of scale is matched. pin: pinned entries of x_t are
    clean, and are passed to the model as such.
    """

    score: Any
    schedule: Schedule
    offset: Float[Array, " D"] | Float[np.ndarray, " D"]
    scale: Float[Array, " D"] | Float[np.ndarray, " D"]
    steps: Int[Array, "2 T"]
    share: Float[Array, " T"]
    pin: Callable[[Float[Array, "B H D"]], Pinned] | None = struct.field(
        pytree_node=False, default=None
    )

    @classmethod
    def between(
        cls,
        score: Any,
        schedule: Schedule,
        between: Normaliser,
        pin: Callable[[Float[Array, "B H D"]], Pinned] | None = None,
    ) -> "Converted":
        """The score converted; between: from the new coordinates to the score's own."""
        bar = np.asarray(schedule.alphas_cumprod, np.float64)
        log_ratio = np.log(bar) - np.log1p(-bar)  # signal to noise; falls with t
        own = log_ratio + 2 * np.log(np.asarray(between.scale, np.float64)).mean()
        place = np.interp(-own, -log_ratio, np.arange(len(bar)))  # the ends where none is beyond
        low = np.floor(place).astype(np.int32)
        steps = np.stack([low, np.minimum(low + 1, len(bar) - 1)])
        share = jnp.asarray(place - low, jnp.float32)
        return cls(score, schedule, between.offset, between.scale, jnp.asarray(steps), share, pin)

    def x0(
        self, x_t: Float[Array, "B H D"], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B H D"]:
        """E[x_0 | x_t] in the new coordinates."""
        offset, scale = (on_last(values, x_t) for values in (self.offset, self.scale))
        clean = (x_t - offset) / scale

        def estimate(steps: Int[Array, " T"]) -> Float[Array, "B H D"]:
            step = steps[t]
            root = jnp.sqrt(self.schedule.alphas_cumprod)
            signal = self.schedule.at(root, step, x_t)
            ratio = signal / self.schedule.at(root, t, x_t)
            own = (ratio * x_t - signal * offset) / scale
            own = self.pin(clean)(own) if self.pin else own
            return estimate_x0(self.score, self.schedule, own, step, cond)

        share = self.schedule.at(self.share, t, x_t)
        found = (1 - share) * estimate(self.steps[0]) + share * estimate(self.steps[1])
        return found * scale + offset

    def __call__(
        self, x_t: Float[Array, "B H D"], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B H D"]:
        """The score with respect to x_t in the new coordinates."""
        return x0_to_score(self.schedule, self.x0(x_t, t, cond), x_t, t)


def expert_in_base_coordinates(
    base: TrajectoryModel, expert: TrajectoryModel, *, pin: bool = True, most: float = 1.25
) -> tuple[Score, list[str]]:
    """The expert's score for trajectories in the base's coordinates.

    Returns the score, and notes about the conversion. pin: x_t's first state is clean. Raises
    InputError naming each difference that cannot be converted: horizon, transition, stride,
    diffusion steps, schedule, or scales whose factor differs by dimension, by more than `most`
    from its mean.
    """
    check_same_space("base and expert", base.space, expert.space)
    theirs = expert.denoiser.schedule
    check_same_schedule("base and expert", base.denoiser.schedule, theirs)
    a, b = base.space.normaliser, expert.space.normaliser
    if a.same_as(b):
        return expert.denoiser, []
    between = a.to(b)  # from the base's coordinates to the expert's
    logs = np.log(np.asarray(between.scale, np.float64))
    ratio, uneven = (float(np.exp(np.abs(x).max())) for x in (logs, logs - logs.mean()))
    alike = "train the expert from the base (--init), which keeps the base's normaliser"
    if uneven > most:
        raise InputError(
            "base and expert differ in their normalisers, by a factor that differs by dimension "
            f"(up to {uneven:.2f} from its mean), too much to convert: {alike}"
        )
    note = (
        f"the normalisers of base and expert differ (scales by a factor of up to {ratio:.3g}): "
        "the expert's score is converted to the base's"
    )
    if uneven > 1.02:
        note += (
            f", as if the factor were one for all dimensions (it is up to {uneven:.3g} from its "
            f"mean); to leave nothing to convert, {alike}"
        )
    pinned = base.space.pin if pin else None
    return Converted.between(expert.denoiser, theirs, between, pinned), [note]
