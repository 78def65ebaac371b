"""Plans of a model, by itself or steered by a reward; rewards of whole samples.

A plan is a trajectory; of a model of images it is a sample, from a start of width 0.

Legend: B plans, H horizon, D transition width, O observation width, N windows.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from common_jax.mesh import constrain, fetch
from common_jax.precision import jit
from reward_jax import sharding
from reward_jax.data.model import SpaceModel
from reward_jax.data.trajectory.space import Plans, TrajectorySpace
from reward_jax.diffusion.process import first_state
from reward_jax.reward.guide import GuidanceOptions, guided_sample, sweep
from reward_jax.tasks.base import Planner, WarmPlanner

__all__ = [
    "Watched",
    "plan",
    "plan_sweep",
    "planner",
    "precomputed",
    "score_windows",
    "start_rows",
]


def plan(
    model: SpaceModel[Any],
    starts: Float[np.ndarray, "B O"],
    *,
    key: Key[Array, ""],
    **options: Any,
) -> Float[Array, "B ..."]:
    """Samples of a model from these starts; options: as of `guided_sample`."""
    shape, pinned = _pinned(model, starts)
    d = model.denoiser
    return guided_sample(d, d.schedule, shape, key=key, pinned=pinned, **options)


def plan_sweep(
    model: SpaceModel[Any],
    starts: Float[np.ndarray, "B O"],
    *,
    key: Key[Array, ""],
    **options: Any,
) -> Float[Array, "scales t_stopgrads B ..."]:
    """Samples for every scale and t_stopgrad; options: as of `sweep`."""
    shape, pinned = _pinned(model, starts)
    d = model.denoiser
    return sweep(d, d.schedule, shape, key=key, pinned=pinned, **options)


def planner(
    model: SpaceModel[Any], *, options: GuidanceOptions | None = None, **given: Any
) -> WarmPlanner:
    """A planner, for a task to execute, of a model's plans; options, given: as of `plan`.

    Given the last plans and how many of their rows were executed, it begins with what is left of
    them (a warm start: see `guided_sample`), their last row again in place of what is missing.
    """

    def planned(
        observations: Float[np.ndarray, "B O"],
        key: Key[Array, ""],
        previous: Plans | None = None,
        executed: int = 0,
    ) -> Any:
        warm, how = None, options or GuidanceOptions()
        if previous is None:
            how = dataclasses.replace(how, skip=0)
        else:
            rows = np.minimum(np.arange(model.space.horizon) + executed, model.space.horizon - 1)
            warm = jnp.asarray(model.space.rows(previous)[:, rows])
        made = plan(model, observations, key=key, warm=warm, options=how, **given)
        return model.space.plans(fetch(made))

    return planned


def precomputed(plans: Any) -> Planner:
    """A planner that returns these plans, for a task that calls it once."""

    def planned(observations: Float[np.ndarray, "B O"], key: Key[Array, ""]) -> Any:
        return plans

    return planned


class Watched:
    """A planner that keeps the observations for which it is asked: states that a world comes by.

    met: [N, O], in the world's own units. A row that has not moved since the planner was asked
    last, as one that has ended does not, is not kept again.
    """

    def __init__(self, planner: WarmPlanner) -> None:
        self._planner = planner
        self._met: list[Float[np.ndarray, "n O"]] = []
        self._last: Float[np.ndarray, "B O"] | None = None

    def __call__(
        self,
        observations: Float[np.ndarray, "B O"],
        key: Key[Array, ""],
        previous: Plans | None = None,
        executed: int = 0,
    ) -> Plans:
        """The plans of the planner."""
        moved = np.ones(len(observations), bool)
        if self._last is not None and self._last.shape == observations.shape:
            moved = (observations != self._last).any(axis=1)
        self._met.append(np.array(observations)[moved])
        self._last = np.array(observations)
        return self._planner(observations, key, previous, executed)

    @property
    def met(self) -> Float[np.ndarray, "N O"]:
        """The states so far."""
        return np.concatenate(self._met)


def start_rows(
    space: TrajectorySpace, observations: Float[np.ndarray, "N O"]
) -> Float[Array, "N H D"]:
    """Trajectories that begin at these observations, all else 0: what chains are pinned to.

    Where guided paths begin (`draw_path_targets`), in the space's own pin.
    """
    pinned = first_state(jnp.asarray(space.normalise(observations)), *space.shape)
    return pinned(jnp.zeros((len(observations), *space.shape)))


def _pinned(
    model: SpaceModel[Any], starts: Float[np.ndarray, "B O"]
) -> tuple[tuple[int, ...], Any]:
    space = model.space
    if space.pin is None:
        return (len(starts), *space.shape), None
    pinned = first_state(jnp.asarray(space.normalise(starts)), *space.shape)
    return (len(starts), *space.shape), pinned


def score_windows(
    guide: Any,
    x_0: Float[Array, "N ..."] | Float[np.ndarray, "N ..."],
    *,
    t: int = 0,
    batch: int = 4096,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, " N"]:
    """The guide's reward of clean trajectories, as it is at diffusion step t.

    batch: windows that are scored in one call. mesh: batches are sharded over its data and fsdp
    axes.
    """
    parts = []
    for start in range(0, len(x_0), batch):
        rows = jnp.asarray(x_0[start : start + batch])
        missing = min(batch, len(x_0)) - len(rows)  # one shape, one program
        padded = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
        parts.append(fetch(_score(guide, padded, t, mesh=mesh))[: len(rows)])
    return np.concatenate(parts)


@functools.partial(jit, static_argnames="mesh")
def _score(
    guide: Any, x: Float[Array, "B ..."], t: int, *, mesh: Mesh | None
) -> Float[Array, " B"]:
    guide, x = sharding.gathered(guide, mesh), constrain(x, mesh)
    return guide(x, jnp.full(x.shape[:1], t))
