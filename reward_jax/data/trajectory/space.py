"""The space of trajectories, models that live in it, and whether two fit each other.

Legend: H horizon, D transition width, A action width, O observation width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from common_jax.errors import InputError
from reward_jax.data.model import SpaceGuide, SpaceModel
from reward_jax.data.trajectory.normalisers import KINDS, Normaliser
from reward_jax.diffusion.process import FirstState
from reward_jax.diffusion.schedule import check_same_schedule

__all__ = [
    "Plans",
    "TrajectoryGuide",
    "TrajectoryModel",
    "TrajectorySpace",
    "check_same_space",
    "check_steers",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Plans:
    """Trajectories in the world's own units.

    actions: None where the model has none. stride: environment steps between rows. Row 0 holds the
    observation that was planned from.
    """

    observations: Float[np.ndarray, "... H O"]
    actions: Float[np.ndarray, "... H A"] | None
    stride: int


@dataclasses.dataclass(frozen=True)
class TrajectorySpace:
    """The layout of a model's trajectories (a `data.model.Space`).

    horizon: H. stride: environment steps between rows. actions: A, which come first in a row.
    normaliser: of rows. about: where the data came from (task, environment, goal, ...), plain
    JSON.
    """

    horizon: int
    stride: int
    actions: int
    normaliser: Normaliser
    about: dict[str, Any]

    @property
    def width(self) -> int:
        """D."""
        return int(np.shape(self.normaliser.offset)[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(H, D)."""
        return self.horizon, self.width

    @property
    def pin(self) -> FirstState:
        """x_0 -> its first observation, pinned."""
        return FirstState(self.actions)

    def normalise(self, observations: Float[np.ndarray, "... O"]) -> Float[np.ndarray, "... O"]:
        """Observations as a model sees them, float32."""
        part = self.normaliser.part(slice(self.actions, None))
        return np.asarray(part.normalise(np.asarray(observations)), np.float32)

    def plans(self, x: Float[Array, "... H D"] | Float[np.ndarray, "... H D"]) -> Plans:
        """Trajectories of a model in the world's own units, float64."""
        restored = self.normaliser.restore(np.asarray(x, np.float64))
        actions = restored[..., : self.actions] if self.actions else None
        return Plans(restored[..., self.actions :], actions, self.stride)

    def rows(self, plans: Plans) -> Float[np.ndarray, "... H D"]:
        """Plans as a model sees them, float32: what `plans` undoes."""
        parts = (
            [plans.observations] if plans.actions is None else [plans.actions, plans.observations]
        )
        return np.asarray(self.normaliser.normalise(np.concatenate(parts, axis=-1)), np.float32)

    def describe(self) -> dict[str, Any]:
        """As plain JSON, for files."""
        n = self.normaliser
        return {
            "horizon": self.horizon,
            "stride": self.stride,
            "actions": self.actions,
            "normaliser": {
                "kind": n.kind,
                "offset": np.asarray(n.offset, np.float64).tolist(),
                "scale": np.asarray(n.scale, np.float64).tolist(),
            },
            "about": self.about,
        }

    @classmethod
    def make(cls, described: Mapping[str, Any]) -> "TrajectorySpace":
        """The space of a description; raises ValueError, KeyError or TypeError for none."""
        n = described["normaliser"]
        offset, scale = (np.asarray(n[k], np.float32) for k in ("offset", "scale"))
        if offset.ndim != 1 or not offset.size or offset.shape != scale.shape:
            raise ValueError("its normaliser's offset and scale are no two lists of one length")
        if not (np.isfinite(offset) & np.isfinite(scale) & (scale > 0)).all():
            raise ValueError("its normaliser's offset is not finite, or its scale not above 0")
        if n["kind"] not in KINDS:
            raise ValueError(f"its normaliser is of no known kind ({n['kind']!r})")
        least = {"horizon": 1, "stride": 1, "actions": 0}
        for name, low in least.items():
            if type(value := described[name]) is not int or value < low:
                raise ValueError(f"its {name} is {value!r}, not {low} or more")
        if described["actions"] >= offset.size:
            raise ValueError(f"its actions leave no observation of {offset.size} dimensions")
        if not isinstance(described["about"], dict):
            raise ValueError("its about is no mapping")
        normaliser = Normaliser(offset, scale, n["kind"])
        horizon, stride, actions = (described[name] for name in least)
        return cls(horizon, stride, actions, normaliser, described["about"])


TrajectoryModel = SpaceModel[TrajectorySpace]
TrajectoryGuide = SpaceGuide[TrajectorySpace]


def check_same_space(what: str, a: TrajectorySpace, b: TrajectorySpace) -> None:
    """Raise InputError naming the first difference of two spaces, normalisers apart.

    what: the two, in words.
    """
    for name, x, y in (
        ("horizon", a.horizon, b.horizon),
        ("transition width", a.width, b.width),
        ("actions", a.actions, b.actions),
        ("stride", a.stride, b.stride),
        ("task", a.about.get("task"), b.about.get("task")),
    ):
        if name == "task" and None in (x, y):
            continue  # data from elsewhere do not say
        if x != y:
            raise InputError(f"{what} differ in {name}: {x} and {y}; train both alike")


def check_steers(what: str, base: TrajectoryModel, guide: TrajectoryGuide) -> None:
    """Raise InputError naming the first reason why a guide cannot steer a base.

    what: the two, in words.
    """
    check_same_space(what, base.space, guide.space)
    check_same_schedule(what, base.denoiser.schedule, guide.schedule)
    if not base.space.normaliser.same_as(guide.space.normaliser):
        raise InputError(
            f"{what} differ in their normalisers: train this base from the reward's own (--init), "
            "which keeps the normaliser"
        )
