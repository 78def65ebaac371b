"""A reward that is capped: what is good enough is left as it is.

    capped = cap_reward(reward, x_0, key)         # x_0: data that the reward likes, the expert's
    x = guided_sample(base, schedule, shape, key=key, guide=capped, options=options)

A relative reward rho is the log of a density ratio, so that guidance of scale s samples in
proportion to base * exp(s rho): large scales, which drive out what rho dislikes, also raise every
small difference among what it does not mind to the power s, and shift that too. Capped at a level
c(t), it is flat above:

    rho'(x, t) = c(t) - w(t) softplus((c(t) - rho(x, t)) / w(t))

a smooth minimum of rho and c, whose gradient is rho's times sigmoid((c - rho) / w). Levels are
those of data: a quantile, at each t, of rho on noised x_0.

Legend: B batch, N data rows, T diffusion steps; x has any shape of a row.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from common_jax import struct
from common_jax.errors import InputError
from common_jax.precision import jit
from reward_jax import sharding
from reward_jax.diffusion.denoiser import Condition, steps_of
from reward_jax.diffusion.process import q_sample
from reward_jax.diffusion.schedule import Schedule
from reward_jax.reward.gradients import gradient_of
from reward_jax.reward.relative import RelativeReward

__all__ = ["CappedReward", "cap_reward"]


@struct.dataclass
class CappedReward:
    """rho' of a relative reward, a `Guide`: see the module.

    level: c(t), in rho's unit (nats). width: w(t), above 0: over what range of rho it levels off.
    """

    reward: RelativeReward
    level: Float[Array, " T"]
    width: Float[Array, " T"]

    @property
    def schedule(self) -> Schedule:
        """The reward's."""
        return self.reward.schedule

    def __call__(self, x_t: Float[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, " B"]:
        """rho', up to a constant for each t; errors as `RelativeReward.learned`."""
        t = steps_of(x_t, t, self.schedule)
        level, width = self.level[t], self.width[t]
        return level - width * jax.nn.softplus((level - self.reward(x_t, t)) / width)

    def gradient(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """grad_x rho' (see `Guide`), at the price of rho's; a condition is ignored."""
        return gradient_of(self, x_t, t)


def cap_reward(
    reward: RelativeReward,
    x_0: Float[Array, "N ..."] | Float[np.ndarray, "N ..."],
    key: Key[Array, ""],
    *,
    quantile: float = 0.7,
    width: float = 0.25,
) -> CappedReward:
    """The reward, capped at each t at a quantile of what it gives x_0 noised to t.

    x_0: a few hundred rows of data that are good enough, such as the expert's. width: in standard
    deviations of these rewards. Runs the reward T x N times. Raises InputError for a quantile
    outside 0 to 1, a width that is not positive, fewer than 2 rows, and a reward that is not
    finite or the same for all rows.
    """
    if not 0 <= quantile <= 1 or not width > 0:
        raise InputError(
            f"quantile is {quantile} and width {width}: give one of 0 to 1, and one above 0"
        )
    if len(x_0) < 2:
        raise InputError(f"x_0 has {len(x_0)} rows, of which levels are taken: give 2 or more")
    rho = _by_step(reward, jnp.asarray(x_0), key)
    level, spread = jnp.quantile(rho, quantile, axis=1), rho.std(axis=1)
    if not (jnp.isfinite(rho).all() and (spread > 0).all()):
        raise InputError(
            "the reward of x_0 is not finite, or the same for every row: it cannot be capped"
        )
    return CappedReward(reward, level, width * spread)


@jit
def _by_step(
    reward: RelativeReward, x_0: Float[Array, "N ..."], key: Key[Array, ""]
) -> Float[Array, "T N"]:
    """The reward of x_0 noised to every t, with noise of its own."""
    schedule, used = reward.schedule, sharding.in_use(reward)

    def at(t: Int[Array, ""]) -> Float[Array, " N"]:
        noise = jax.random.normal(jax.random.fold_in(key, t), x_0.shape, x_0.dtype)
        steps = jnp.full(len(x_0), t)
        return used(q_sample(schedule, x_0, steps, noise), steps)

    return jax.lax.map(at, jnp.arange(schedule.steps))
