"""The reward of safe guidance as a guide of the base.

The study's reward sees latents that are standardised by their step, and its gradient is matched in
a size of its own (`reward.py`). Undone, with y = (x_t - mean) / deviation,

    size at t * grad_y r(y, t) / sqrt(1 - abar_t)

is the difference of scores, safe less base, however the latents were standardised:

    guide = load_steering("runs/i2p-study")
    guided_sample(sd.guided_score(7.5), sd.schedule, shape, key=key, guide=guide, cond=text)

Legend: B batch, U different diffusion steps of a chain, h, w, C of latents.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common_jax import struct
from reward_jax.data.checkpoint import load_guide
from reward_jax.data.latents import LatentSpace
from reward_jax.diffusion.denoiser import Condition
from reward_jax.diffusion.schedule import Schedule
from reward_jax.reward.relative import RelativeReward
from reward_jax.reward.targets import unit
from reward_jax.studies.i2p.reward import Scaling, read_scaling

__all__ = ["Steering", "load_steering"]


@struct.dataclass
class Steering:
    """See the module. reward: of standardised latents. scaling: at diffusion steps t, rising.

    Between two of these steps the scaling is interpolated; before the first and after the last it
    is theirs.
    """

    reward: RelativeReward
    mean: Float[Array, "U ..."]
    deviation: Float[Array, "U ..."]
    size: Float[Array, "U ..."]
    t: Int[Array, " U"]

    @classmethod
    def of(cls, reward: RelativeReward, scaling: Scaling) -> "Steering":
        """With the scaling that the reward was matched with."""
        t, first = np.unique(scaling.t, return_index=True)  # PNDM walks one step twice
        leaves = scaling.mean, scaling.deviation, scaling.size
        mean, deviation, size = (jnp.asarray(leaf[first]) for leaf in leaves)
        return cls(reward, mean, deviation, size, jnp.asarray(t))

    @property
    def schedule(self) -> Schedule:
        """Of the base."""
        return self.reward.schedule

    def gradient(
        self, x_t: Float[Array, "B h w C"], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B h w C"]:
        """The difference of scores (see `Guide`); a reward has no condition, and ignores it."""
        mean, deviation, size = (self._at(x, t) for x in (self.mean, self.deviation, self.size))
        learned = self.reward.learned_gradient((x_t - mean) / deviation, t)
        per_score = unit(self.schedule, self.reward.target)[t].reshape(-1, 1, 1, 1)
        return size * learned / per_score

    def _at(self, leaf: Float[Array, "U ..."], t: Int[Array, " B"]) -> Float[Array, "B ..."]:
        columns = leaf.reshape(len(leaf), -1)
        found = jax.vmap(lambda column: jnp.interp(t, self.t, column), 1, 1)(columns)
        return found.reshape(-1, *leaf.shape[1:])


def load_steering(out: str | pathlib.Path) -> Steering:
    """The guide of a study's folder; raises InputError where its reward is missing or damaged."""
    folder = pathlib.Path(out) / "reward"
    reward = load_guide(folder / "reward.safetensors", LatentSpace).guide
    assert isinstance(reward, RelativeReward)
    return Steering.of(reward, read_scaling(folder / "scaling.npz"))
