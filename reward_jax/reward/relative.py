"""A learned relative reward: rho(x_t, t) of a network's parameters, and what it guides by.

The network's own output r is u(t) rho, in the unit of what it was matched to (`targets.py`).

Legend: B batch, S seeds; x_t has any shape of a row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from common_jax import struct
from common_jax.errors import InputError
from common_jax.precision import precise
from reward_jax.diffusion.denoiser import Condition, steps_of
from reward_jax.diffusion.schedule import Schedule
from reward_jax.reward.gradients import gradient_of, one_a_row
from reward_jax.reward.targets import Target, unit

__all__ = ["RelativeReward", "SeedBlocks", "reward_gradient"]


def reward_gradient(
    reward: Any, params: PyTree[Float[Array, "..."]], x: Float[Array, "B ..."], t: Int[Array, " B"]
) -> Float[Array, "B ..."]:
    """grad_x of the reward network's output, each row's own."""
    return gradient_of(lambda x, t: reward.apply({"params": params}, x, t), x, t)


@struct.dataclass
class RelativeReward:
    """A learned relative reward: calling it gives rho(x_t, t).

    params: with `seeds`, leaves have a leading axis [S] and the mean over seeds is taken. target:
    what it was matched to, which says the unit of the network's output.
    """

    params: PyTree[Float[Array, "..."]]
    schedule: Schedule
    reward: Any = struct.field(pytree_node=False)
    target: Target = struct.field(pytree_node=False, default="epsilon")
    seeds: int | None = struct.field(pytree_node=False, default=None)

    def __call__(self, x_t: Float[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, " B"]:
        """The relative reward rho, up to a constant for each t; errors as of `learned`."""
        t = steps_of(x_t, t, self.schedule)
        return self.learned(x_t, t) / unit(self.schedule, self.target)[t]

    @precise
    def learned(self, x_t: Float[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, " B"]:
        """The network's own output, in the target's unit.

        Raises InputError where that is not one number a row, and as `steps_of`.
        """
        t = steps_of(x_t, t, self.schedule)
        run = functools.partial(self._apply, x_t=x_t, t=t)
        if self.seeds is None:
            return run(self.params)
        return jnp.mean(jax.vmap(run)(self.params), axis=0)

    def gradient(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """grad_x rho (see `Guide`); a reward has no condition, and ignores it."""
        return gradient_of(self, x_t, t)

    def learned_gradient(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """grad_x of the network's own output."""
        return gradient_of(self.learned, x_t, t)

    def _apply(
        self, params: Any, x_t: Float[Array, "B ..."], t: Int[Array, " B"]
    ) -> Float[Array, " B"]:
        return one_a_row(self.reward.apply({"params": params}, x_t, t), x_t)

    def seed(self, index: int) -> "RelativeReward":
        """The reward of one seed; raises InputError for one that was not trained."""
        if self.seeds is None or not 0 <= index < self.seeds:
            raise InputError(f"there is no seed {index}: seeds is {self.seeds}")
        params = jax.tree.map(lambda x: x[index], self.params)
        return self.replace(params=params, seeds=None)  # pyright: ignore[reportAttributeAccessIssue]


@struct.dataclass
class SeedBlocks:
    """A guide of S blocks of rows, each steered by one seed alone: seeds judged apart at once.

    reward: with seeds. Of B rows, a multiple of S, the first B / S are the first seed's.
    """

    reward: RelativeReward

    def gradient(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """grad_x rho of each row's own seed (see `Guide`); InputError for rows without one."""
        return self._blocks(RelativeReward.gradient, x_t, t)

    def learned_gradient(
        self, x_t: Float[Array, "B ..."], t: Int[Array, " B"], cond: Condition | None = None
    ) -> Float[Array, "B ..."]:
        """grad_x of each row's own network's output; errors as of `gradient`."""
        return self._blocks(RelativeReward.learned_gradient, x_t, t)

    def _blocks(
        self, of: Any, x_t: Float[Array, "B ..."], t: Int[Array, " B"]
    ) -> Float[Array, "B ..."]:
        seeds = self.reward.seeds
        if not seeds or x_t.shape[0] % seeds:
            raise InputError(
                f"{x_t.shape[0]} rows cannot be {seeds or 0} blocks of one seed each: give a "
                "reward with seeds, and a multiple of them"
            )

        def one(params: Any, x: Float[Array, "n ..."], t: Int[Array, " n"]) -> Any:
            alone = self.reward.replace(params=params, seeds=None)  # pyright: ignore[reportAttributeAccessIssue]
            return of(alone, x, t)

        x, t = (a.reshape(seeds, -1, *a.shape[1:]) for a in (x_t, t))
        return jax.vmap(one)(self.reward.params, x, t).reshape(x_t.shape)
