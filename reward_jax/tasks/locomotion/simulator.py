"""Many robots of one kind, stepped by MuJoCo on threads: bit-equal to `env.step` of each.

Each has its own state in MuJoCo (the solver of contacts starts from the last step's forces, which
`mujoco.rollout` does not hand out), stepped by the one call that the environment makes; what the
environment does in Python besides is done for all at once.

Legend: B robots, O observation width, A action width.
"""

import concurrent.futures
import functools
import importlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from common_jax import extras
from common_jax.errors import InputError
from common_jax.mesh import cores
from reward_jax.tasks.locomotion.robots import ROBOTS, environment, quiet

__all__ = ["Simulator", "Step", "resets"]


class Step(NamedTuple):
    """What a step leads to; a row that is not active keeps its observation, its reward is 0."""

    observations: Float[np.ndarray, "B O"]
    rewards: Float[np.ndarray, " B"]
    terminated: Bool[np.ndarray, " B"]


class Simulator:
    """Robots that do not meet, B of them.

    active: [B], those that are stepped; a robot that terminates leaves it, and a caller may clear
    rows that it is done with. threads: by default one a processor that this process may use.
    """

    def __init__(
        self, name: str, observations: Float[np.ndarray, "B O"], *, threads: int | None = None
    ) -> None:
        """At the states of these observations, at the start of the track.

        Raises InputError for observations of another width. (A velocity at its limit in an
        observation is taken for what it is; resets are far from it.)
        """
        with extras.named():
            mujoco: Any = importlib.import_module("mujoco")

        self.robot = ROBOTS[name]
        made: Any = environment(name).unwrapped
        model = self._model = made.model
        width = model.nq - 1 + model.nv
        observations = np.asarray(observations, np.float64)
        if observations.ndim != 2 or observations.shape[1] != width:
            raise InputError(
                f"{self.robot.environment} has observations [B, {width}], not "
                f"{list(observations.shape)}: give its own data or model"
            )
        self.dt = float(model.opt.timestep * self.robot.frame_skip)
        self.actions = int(model.nu)
        self.active = np.ones(len(observations), bool)
        self._threads = threads or cores()
        self._step: Any = mujoco.mj_step
        self._states: list[Any] = [mujoco.MjData(model) for _ in observations]
        with quiet():
            for state, row in zip(self._states, observations, strict=True):
                state.qpos[1:], state.qvel[:] = row[: model.nq - 1], row[model.nq - 1 :]
                mujoco.mj_forward(model, state)
        self.positions = np.stack([state.qpos for state in self._states])
        self.velocities = np.stack([state.qvel for state in self._states])

    @property
    def observations(self) -> Float[np.ndarray, "B O"]:
        """What each robot observes, float64."""
        limit = self.robot.speed_limit
        return np.concatenate(
            [self.positions[:, 1:], np.clip(self.velocities, -limit, limit)], axis=1
        )

    def step(self, actions: Float[np.ndarray, "B A"]) -> Step:
        """One environment step of the active robots with these actions, clipped to [-1, 1].

        Raises InputError for actions of another width or that are not finite.
        """
        actions = np.clip(np.asarray(actions, np.float32), -1, 1)
        if actions.shape != (len(self.active), self.actions):
            raise InputError(
                f"{self.robot.environment} has actions [B, {self.actions}], not "
                f"{list(actions.shape)}: give its own data or model"
            )
        stepped = np.flatnonzero(self.active)
        if not np.isfinite(actions[stepped]).all():
            raise InputError("actions are not finite: lower the guidance scale")
        before = self.positions[:, 0].copy()
        with quiet():
            parts = np.array_split(stepped, self._threads)
            done = [_pool(self._threads).submit(self._run, part, actions) for part in parts[1:]]
            self._run(parts[0], actions)
            for one in done:
                one.result()
        robot = self.robot
        healthy = robot.healthy(self.positions, self.velocities)
        cost = robot.control_cost * np.square(actions).sum(axis=1)
        rewards = (self.positions[:, 0] - before) / self.dt + robot.alive_bonus * healthy - cost
        terminated = self.active & ~healthy
        step = Step(self.observations, np.where(self.active, rewards, 0.0), terminated)
        self.active &= healthy
        return step

    def _run(self, rows: Int[np.ndarray, " n"], actions: Float[np.ndarray, "B A"]) -> None:
        """Step these robots; MuJoCo lets go of Python meanwhile."""
        for row in rows:
            state = self._states[row]
            state.ctrl[:] = actions[row]
            self._step(self._model, state, nstep=self.robot.frame_skip)
            self.positions[row], self.velocities[row] = state.qpos, state.qvel


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(max(1, threads - 1))


def resets(name: str, count: int, seed: int) -> Float[np.ndarray, "count O"]:
    """Observations after as many resets of the environment, each with a seed of its own."""
    env = environment(name)
    seeds = np.random.SeedSequence(seed).generate_state(count)
    return np.stack([env.reset(seed=int(one))[0] for one in seeds])
