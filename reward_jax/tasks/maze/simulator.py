"""Many balls in one maze, stepped by MuJoCo: bit-equal to `env.step` of each, but quicker.

It is the environment's own model, one step of `mujoco.rollout` a call, so that actions may depend
on the states. Legend: B balls; a state is (x, y, vx, vy), metres and metres a second.
"""

import functools
import importlib
from typing import Any

import numpy as np
from jaxtyping import Float

from common_jax import extras
from reward_jax.tasks.maze.mazes import Maze, environment

__all__ = ["Simulator"]

MAX_SPEED = 5.0  # PointMaze clips both velocities to this before it steps


class Simulator:
    """Balls that do not collide, B of them. states: [B, 4] float64. dt: seconds of a step."""

    def __init__(self, maze: Maze, states: Float[np.ndarray, "B 4"]) -> None:
        with extras.named():
            mujoco: Any = importlib.import_module("mujoco")
            rollout: Any = importlib.import_module("mujoco.rollout")

        self._model = _model(maze.name)
        self._data = mujoco.MjData(self._model)
        # No threads of its own: it runs in the caller's.
        self._rollout = rollout.Rollout(nthread=0)
        self.dt = float(self._model.opt.timestep)
        self.states = np.array(states, np.float64)
        count = len(self.states)
        self._from = np.zeros((count, 5))  # MuJoCo's own: time, positions, velocities
        self._to = np.zeros((count, 1, 5))
        self._acceleration = np.zeros((count, 1, 3))

    def step(self, actions: Float[np.ndarray, "B 2"]) -> Float[np.ndarray, "B 4"]:
        """The new states after one step with these forces, clipped to [-1, 1]."""
        controls = np.clip(actions, -1.0, 1.0).astype(np.float64)
        self._from[:, 1:3] = self.states[:, :2]
        self._from[:, 3:] = np.clip(self.states[:, 2:], -MAX_SPEED, MAX_SPEED)
        self._rollout.rollout(
            self._model,
            self._data,
            self._from,
            controls[:, None],
            initial_warmstart=self._acceleration[:, 0, :2],
            nstep=1,
            state=self._to,
            sensordata=self._acceleration,
        )
        self.states = self._to[:, 0, 1:].copy()
        return self.states


@functools.cache
def _model(name: str) -> Any:
    """The environment's model with a sensor of the ball's acceleration, which changes no motion.

    The solver of contacts starts from the last step's acceleration: the environment keeps it,
    `rollout` must be given it, and a sensor is how it comes out.
    """
    with extras.named():
        mujoco: Any = importlib.import_module("mujoco")
    with environment(name) as env:
        made: Any = env.unwrapped
        spec = mujoco.MjSpec.from_file(made.tmp_xml_file_path)
    spec.add_sensor(
        name="acceleration",
        type=mujoco.mjtSensor.mjSENS_FRAMELINACC,
        objtype=mujoco.mjtObj.mjOBJ_BODY,
        objname="particle",
    )
    return spec.compile()
