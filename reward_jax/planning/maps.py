"""Where a reward is high in the plane of its task.

    plane = plane_of(task)
    found = map_of(plane, guide, rows, bins=10)
    print(Peak.of(found, plane, goal))

Legend: N windows of H rows, D wide.
"""

import dataclasses

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from common_jax.errors import InputError
from reward_jax.data.trajectory.space import TrajectoryGuide
from reward_jax.planning.plan import score_windows
from reward_jax.reward.relative import RelativeReward
from reward_jax.tasks.base import Task
from reward_jax.tasks.plane import HeatMap, Plane

__all__ = ["check_step", "each_seed", "map_of", "plane_of"]


def map_of(
    plane: Plane,
    guide: TrajectoryGuide,
    rows: Float[np.ndarray, "N H D"] | Float[Array, "N H D"],
    *,
    bins: int,
    t: int = 0,
    mesh: Mesh | None = None,
) -> HeatMap:
    """The heat map of a reward, or a discriminator, over windows of its space.

    bins: along the side of a cell. t: diffusion step at which windows are scored. mesh: they are
    sharded over its data and fsdp axes. Raises InputError for a step that there is not, and where
    no bin holds enough positions.
    """
    check_step(guide, t)
    scores = score_windows(guide.guide, rows, t=t, mesh=mesh)
    return plane.heat_map(guide.space.plans(rows).observations, scores, bins=bins)


def each_seed(guide: TrajectoryGuide) -> list[TrajectoryGuide]:
    """Each seed's reward by itself; of a reward without seeds, that alone."""
    reward = guide.guide
    if not isinstance(reward, RelativeReward):
        raise InputError("a discriminator has no seeds; a reward is wanted")
    if not reward.seeds:
        return [guide]
    return [dataclasses.replace(guide, guide=reward.seed(i)) for i in range(reward.seeds)]


def plane_of(task: Task) -> Plane:
    """The plane of a task; raises InputError where it has none."""
    if task.plane is None:
        raise InputError(f"{task.name} has no plane in which a map could be drawn")
    return task.plane


def check_step(guide: TrajectoryGuide, t: int) -> None:
    """Raise InputError for a diffusion step that a guide does not know."""
    if not 0 <= t < guide.schedule.steps:
        raise InputError(f"t is {t}: give 0 to {guide.schedule.steps - 1}")
