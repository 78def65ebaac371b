"""The MuJoCo robots as tasks: plan, act on the first rows of the plan, plan again.

Legend: B robots, O observation width, H rows of a plan, F frames that are drawn, P positions.
"""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from common_jax.errors import InputError
from common_jax.mesh import arrays_by_first
from reward_jax.data.episodes import Episodes
from reward_jax.tasks.base import Captions, Measure, Outcome, Planner, Rollout, Task
from reward_jax.tasks.locomotion.bodies import FAR, draw_strip
from reward_jax.tasks.locomotion.collect import SETS, collect
from reward_jax.tasks.locomotion.policies import Policy, read_policies
from reward_jax.tasks.locomotion.robots import ROBOTS, environment, robot_of
from reward_jax.tasks.locomotion.simulator import Simulator, resets

__all__ = ["BASE", "TASKS", "LocomotionTask", "task_of"]

BASE = "medium-replay"  # what a base learns from, as in the paper
_FRAMES = 10
_LANES = 3  # robots in a picture
_HEIGHT = 2.2  # metres between lanes

TASKS = tuple(ROBOTS)  # names


class LocomotionTask(Task):
    """One robot: run as far as possible without falling.

    A goal is the set of data that an expert learns from, "expert" first; a base's is
    medium-replay. Returns are the environment's own, whatever the goal.
    """

    measures = (
        Measure("return", "return", "return of an episode", executed=True, digits=1),
        Measure("normalized", "normalized", "D4RL's normalized score", executed=True),
        Measure(
            "steps", "steps", "steps until it fell, or time was over", executed=True, digits=0
        ),
    )
    captions = Captions(
        story="Two diffusion models plan how a robot moves: the base as weak policies do, the "
        "expert as a strong one.",
        base="Windows of what the base was trained on.",
        expert="Robots that follow its plans, from the starts used below.",
        measured="Returns of episodes in which the first actions of each plan are executed before "
        "the next is made; normalized as D4RL does (0: a random policy, 100: its expert).",
        alt_base="windows that the base learned",
        alt_expert="robots that follow the expert's plans",
    )
    replans = True
    packages = ("gymnasium", "mujoco")

    def __init__(self, name: str, own: Mapping[str, Policy] | None = None) -> None:
        """own: policies by stage that data are recorded with, in place of the shipped ones."""
        self.name, self.robot, self._own = name, ROBOTS[name], own
        self.environment, self.terminates = self.robot.environment, self.robot.terminates
        made: Any = environment(name)
        self.widths = made.observation_space.shape[0], made.action_space.shape[0]

    def record(self, *, episodes: int, span: int, seed: int, goal: Any = None) -> Episodes:
        """See `collect`. Windows are padded where an episode is shorter than `span`."""
        return collect(self.name, goal or BASE, episodes=episodes, seed=seed, own=self._own)

    def with_policies(self, path: str) -> "LocomotionTask":
        return LocomotionTask(self.name, read_policies(path, self.name))

    def goals(self) -> list[Any]:
        return [name for name in SETS if name != BASE]

    def goal(self, given: Any) -> str | None:
        """0 for "expert", and so on, or a set's name; None as it is, for returns need none."""
        names = self.goals()
        if given is None or given in SETS:
            return given
        number = str(given)
        if not number.isdecimal() or int(number) >= len(names):
            raise InputError(
                f"goal {given!r}: {self.name} has the data {', '.join(SETS)}: give one of these, "
                f"or a number from 0 to {len(names) - 1}"
            )
        return names[int(number)]

    def describe(self, goal: Any) -> str:
        return f"episodes of {self.environment}, {goal or BASE}"

    def starts(self, count: int, seed: int) -> Float[np.ndarray, "count O"]:
        """Observations after resets of the environment, each with a seed of its own."""
        return resets(self.name, count, seed)

    def execute(
        self,
        planner: Planner,
        starts: Float[np.ndarray, "B O"],
        *,
        key: Key[Array, ""],
        goal: Any,
        simulate: bool = True,
        rollout: Rollout | None = None,
    ) -> Outcome:
        """Returns of episodes; each plan is made for all robots at once, also those that fell.

        Of several processes, which plan together, process 0 alone acts: on hosts of unlike
        processors robots part by rounding, and plans, and how many are made, follow from them.
        shown: positions [B, F, P] of frames evenly spaced in time. Without steps of the world
        there is nothing to measure. Raises InputError for plans without actions, with strides, or
        of fewer rows than are to be executed.
        """
        rollout = rollout or Rollout()
        last = rollout.steps if simulate else 0
        robots = _Acting(self.name, starts, last)
        done, planning, began = 0, 0.0, time.perf_counter()
        seen, plans = arrays_by_first(robots.seen), None
        while done < last and seen["active"].any():
            asked, observations = time.perf_counter(), seen["observations"]
            fresh = jax.random.fold_in(key, done)
            if rollout.warm_start and plans is not None:
                warm: Any = planner
                plans = warm(observations, fresh, previous=plans, executed=rollout.execute)
            else:
                plans = planner(observations, fresh)
            planning += time.perf_counter() - asked
            actions = self._actions(plans.actions, plans.stride)
            rollout.check(actions.shape[1], self.name)
            some = actions[:, : min(rollout.execute, last - done)]
            seen, done = arrays_by_first(functools.partial(robots.act, some)), done + some.shape[1]
        found = arrays_by_first(robots.found)
        measured = {
            "return": found["returns"],
            "normalized": self.robot.normalized(found["returns"]),
            "steps": found["steps"],
        }
        total = time.perf_counter() - began
        return Outcome(
            {name: value if simulate else None for name, value in measured.items()},
            found["frames"],
            {"planning": planning, "stepping": total - planning} if simulate else {},
        )

    def _actions(
        self, actions: Float[np.ndarray, "B H A"] | None, stride: int
    ) -> Float[np.ndarray, "B H A"]:
        if actions is None or stride != 1:
            raise InputError(
                f"{self.name} acts at every step, but the model's plans have "
                + ("no actions" if actions is None else f"a row every {stride} steps")
                + ": train it with --actions true --stride 1"
            )
        return actions

    def draw(
        self, axes: Any, shown: Float[np.ndarray, "B F P"], *, goal: Any, color: str = "#0072b2"
    ) -> None:
        """A strip for each of the first robots, from its start at the left to its end."""
        strips = shown[:_LANES]
        axes.set(xlim=(-FAR, FAR * strips.shape[1]), ylim=(-0.8, _HEIGHT * len(strips)), yticks=[])
        axes.set(xticks=[], xlabel="time")
        axes.set_aspect("equal")
        for lane, positions in enumerate(strips):
            draw_strip(axes, self.name, positions, lane=_HEIGHT * lane, color=color)

    def recorded(self, observations: Float[np.ndarray, "B H O"]) -> Float[np.ndarray, "B F P"]:
        """Positions; how far each has come is the sum of its velocities, row by row."""
        made: Any = environment(self.name).unwrapped
        rest = made.model.nq - 1
        rows = np.linspace(0, observations.shape[1] - 1, _FRAMES).round().astype(int)
        way = made.dt * (np.cumsum(observations[..., rest], axis=1) - observations[:, :1, rest])
        return np.concatenate([way[..., None], observations[..., :rest]], axis=-1)[:, rows]

    def summarise(self, means: dict[str, float | None]) -> str:
        if means["return"] is None:
            return "not executed"
        return (
            f"return {means['return']:.1f} (normalized {means['normalized']:.1f}) "
            f"in {means['steps']:.0f} steps"
        )


class _Acting:
    """B robots, and what has come of them; frames of steps evenly spaced up to the last."""

    def __init__(self, name: str, starts: Float[np.ndarray, "B O"], last: int) -> None:
        self._simulator = Simulator(name, starts)
        self._returns, self._steps = np.zeros(len(starts)), np.zeros(len(starts), int)
        self._shown = np.linspace(0, last, _FRAMES).round().astype(int)
        self._frames, self._done = [self._simulator.positions.copy()], 0

    def seen(self) -> dict[str, Any]:
        """What the next plans depend on: observations [B, O], and which robots are active [B]."""
        return {"observations": self._simulator.observations, "active": self._simulator.active}

    def act(self, actions: Float[np.ndarray, "B k A"]) -> dict[str, Any]:
        """Step k times; returns what is seen then."""
        for row in range(actions.shape[1]):
            self._steps += self._simulator.active
            self._returns += self._simulator.step(actions[:, row]).rewards
            self._done += 1
            if self._done in self._shown:
                self._frames.append(self._simulator.positions.copy())
        return self.seen()

    def found(self) -> dict[str, Any]:
        """Returns and steps [B], frames [B, F, P]: those after the end are as the last."""
        rest = [self._simulator.positions] * (_FRAMES - len(self._frames))
        frames = np.stack([*self._frames, *rest], axis=1)
        return {"returns": self._returns, "steps": self._steps, "frames": frames}


def task_of(environment: str) -> str | None:
    """The task of a Gymnasium id, any version, or of D4RL's names; None for another world."""
    return robot_of(environment)
