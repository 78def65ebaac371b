"""The planar robots of Gymnasium's MuJoCo environments: bodies, rewards, and D4RL's references.

    HalfCheetah-v5, Hopper-v5, Walker2d-v5

An observation is the generalized positions without the first (metres along the track) and the
velocities. The constants below are the environments' own, held to them by a test; the reference
returns are D4RL's (arXiv 2004.07219, `d4rl/infos.py`).

Legend: B robots, O observation width, A action width, P generalized positions, V velocities.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from common_jax import extras

if TYPE_CHECKING:
    import gymnasium

__all__ = ["ROBOTS", "Robot", "environment", "quiet", "robot_of"]


@dataclasses.dataclass(frozen=True)
class Robot:
    """One robot and what it is rewarded for.

    reward of a step = velocity (m/s) + alive_bonus, while it is healthy, - control_cost * sum of
    squared actions. It is healthy while its torso's height (m) and angle (rad) lie in these open
    ranges, and every other position and velocity within `bound`; an episode terminates where it
    is not. frame_skip: simulation steps of an environment step. speed_limit: velocities are
    clipped to it in observations. low, high: D4RL's returns of a random policy and of an expert
    for a normalized score of 0 and 100.
    """

    environment: str
    frame_skip: int
    control_cost: float
    low: float
    high: float
    alive_bonus: float = 0.0
    height: tuple[float, float] = (-math.inf, math.inf)
    angle: tuple[float, float] = (-math.inf, math.inf)
    bound: float = math.inf
    speed_limit: float = math.inf

    @property
    def terminates(self) -> bool:
        """Whether an episode can end before its time."""
        return self.height[0] > -math.inf

    def healthy(
        self, positions: Float[np.ndarray, "B P"], velocities: Float[np.ndarray, "B V"]
    ) -> Bool[np.ndarray, " B"]:
        """Whether each is healthy; False for one whose state is not finite."""
        if not self.terminates:
            return np.ones(len(positions), bool)
        height, angle = positions[:, 1], positions[:, 2]
        rest = np.concatenate([positions[:, 2:], velocities], axis=1)
        return (
            (self.height[0] < height)
            & (height < self.height[1])
            & (self.angle[0] < angle)
            & (angle < self.angle[1])
            & (np.abs(rest) < self.bound).all(axis=1)
        )

    def normalized(self, returns: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """D4RL's normalized score of returns of whole episodes: 0 random, 100 expert."""
        return 100 * (np.asarray(returns, np.float64) - self.low) / (self.high - self.low)

    def normalized_error(self, error: float | None) -> float | None:
        """The standard error of a normalized score, of its return's; None of None."""
        return None if error is None else 100 * error / (self.high - self.low)


ROBOTS = {
    "halfcheetah": Robot("HalfCheetah-v5", 5, 0.1, -280.178953, 12135.0),
    "hopper": Robot(
        "Hopper-v5", 4, 1e-3, -20.272305, 3234.3,
        alive_bonus=1.0, height=(0.7, math.inf), angle=(-0.2, 0.2), bound=100.0, speed_limit=10.0,
    ),
    "walker2d": Robot(
        "Walker2d-v5", 4, 1e-3, 1.629008, 4592.3,
        alive_bonus=1.0, height=(0.8, 2.0), angle=(-1.0, 1.0), speed_limit=10.0,
    ),
}  # fmt: skip


def robot_of(environment: str | None) -> str | None:
    """The name here of an environment's id, any version, or of D4RL's; else None."""
    bare = re.sub(r"-v\d+$", "", environment or "").lower()
    bare = re.sub(r"-(random|medium|expert|medium-replay|medium-expert|full-replay)$", "", bare)
    return bare if bare in ROBOTS else None


@functools.cache
def environment(name: str) -> "gymnasium.Env":
    """The Gymnasium environment, one of each in a process; InputError names a missing extra."""
    with extras.named():
        import gymnasium

        importlib.import_module("mujoco")  # here, for our message where it is missing
    with quiet():
        return gymnasium.make(ROBOTS[name].environment)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without MuJoCo's warnings, which it prints and also writes to a file in the current folder.

    They are of deprecated attributes in Gymnasium's own models, and of states that are not finite,
    which end an episode.
    """
    with extras.named():
        mujoco: Any = importlib.import_module("mujoco")

    before = mujoco.get_mju_user_warning()  # a caller's own, or that of a block around this one
    mujoco.set_mju_user_warning(_ignore)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def _ignore(message: str) -> None:
    """For a warning that is no one's concern."""
