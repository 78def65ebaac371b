"""The PointMaze mazes as tasks: walk to a goal, plan once, follow the plan in the simulator.

Legend: B plans, H rows of a plan, O observation width.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Key

from reward_jax.data.episodes import Episodes
from reward_jax.tasks.base import Captions, Measure, Outcome, Planner, Rollout, Task
from reward_jax.tasks.maze.collect import collect, steps_for
from reward_jax.tasks.maze.mazes import (
    ENVIRONMENTS,
    Maze,
    check_goal,
    draw_maze,
    goals,
    maze,
    maze_of,
    uniform_starts,
)
from reward_jax.tasks.maze.planner import follow
from reward_jax.tasks.plane import Plane, draw_paths, read_point

__all__ = ["NEAR", "TASKS", "MazePlane", "MazeTask", "task_of"]

NEAR = 0.5  # metres; nearer than this counts as at the goal (cells are 1 m wide)
_SHARE = "share of plans that end at the goal"


class MazePlane(Plane):
    """The map of a maze; metres. A peak is at its goal when it lies in the goal's cell."""

    place = "cell"

    def __init__(self, layout: Maze) -> None:
        self.layout = layout
        self.extent = layout.extent
        self.cell = layout.size

    def positions(self, observations: Float[np.ndarray, "... O"]) -> Float[np.ndarray, "... 2"]:
        return observations[..., :2]

    def same_place(self, a: Float[np.ndarray, "2"], b: Float[np.ndarray, "2"]) -> bool:
        return bool((self.layout.cell_of(a) == self.layout.cell_of(b)).all())

    def draw(self, axes: Any) -> None:
        draw_maze(axes, self.layout)


class MazeTask(Task):
    """One maze. Observations are (x, y, vx, vy), metres and metres a second."""

    measures = (
        Measure("planned", "as planned", f"{_SHARE} (planned)", executed=False),
        Measure("executed", "executed", f"{_SHARE} (executed)", executed=True),
        Measure(
            "inside", "positions in free cells", "share of planned positions in free cells",
            executed=False, digits=3,
        ),
    )  # fmt: skip
    captions = Captions(
        story="Two diffusion models plan walks through a maze: the base to anywhere, the expert "
        "to one goal.",
        base="Walks to random goals: what it was trained on.",
        expert="Its own plans, from the starts used below.",
        measured=f"Shares of plans that end within {NEAR:g} m of the goal: as planned, and when "
        "a controller follows the plan in the simulator.",
        alt_base="walks that the base learned",
        alt_expert="plans of the expert",
    )
    packages = ("gymnasium-robotics", "mujoco")

    def __init__(self, name: str) -> None:
        self.layout = maze(name)
        self.name, self.environment = name, ENVIRONMENTS[name]
        self.plane: MazePlane = MazePlane(self.layout)

    def record(self, *, episodes: int, span: int, seed: int, goal: Any = None) -> Episodes:
        steps = steps_for(self.layout, span)
        return collect(self.layout, goal=goal, episodes=episodes, steps=steps, seed=seed)

    def goals(self) -> list[Any]:
        return goals(self.layout).tolist()

    def goal(self, given: Any) -> list[float]:
        """0 to 7 for one of `goals()`, "x,y", or [x, y] in metres."""
        return check_goal(self.layout, read_point(given, self.goals())).tolist()

    def describe(self, goal: Any) -> str:
        if goal is None:
            return "walks to random goals"
        return f"walks to the goal ({goal[0]:g}, {goal[1]:g})"

    def starts(self, count: int, seed: int) -> Float[np.ndarray, "count 4"]:
        """States at rest, uniform over the free area."""
        xy = uniform_starts(self.layout, count, np.random.default_rng(seed))
        return np.concatenate([xy, np.zeros_like(xy)], axis=1)

    def execute(
        self,
        planner: Planner,
        starts: Float[np.ndarray, "B 4"],
        *,
        key: Key[Array, ""],
        goal: Any,
        simulate: bool = True,
        rollout: Rollout | None = None,
    ) -> Outcome:
        """Whether plans, and the balls that follow them, end within 0.5 m of the goal.

        inside: share of a plan's positions that lie in free cells. shown: positions [B, H, 2].
        """
        plans = planner(starts, key)
        xy = self.plane.positions(plans.observations)

        def near(last: Float[np.ndarray, "B 2"]) -> Bool[np.ndarray, " B"]:
            return np.linalg.norm(last - np.asarray(goal), axis=-1) < NEAR

        executed = None
        if simulate:
            executed = near(follow(self.layout, xy, starts, plans.stride)[:, -1])
        inside = self.layout.inside(xy).mean(axis=1)
        return Outcome({"planned": near(xy[:, -1]), "executed": executed, "inside": inside}, xy)

    def draw(
        self, axes: Any, shown: Float[np.ndarray, "B H 2"], *, goal: Any, color: str = "#0072b2"
    ) -> None:
        """Paths in the maze, a dot where each ends, a star for the goal."""
        draw_maze(axes, self.layout)
        draw_paths(axes, shown, goal=goal, color=color)

    def recorded(self, observations: Float[np.ndarray, "B H 4"]) -> Float[np.ndarray, "B H 2"]:
        return self.plane.positions(observations)

    def summarise(self, means: dict[str, float | None]) -> str:
        planned = f"{means['planned']:.2f} of plans end at the goal"
        executed = means["executed"]
        return planned if executed is None else f"{planned}, {executed:.2f} when executed"


TASKS = tuple(ENVIRONMENTS)  # names


def task_of(environment: str) -> str | None:
    """The task of a Gymnasium id, any version, dense rewards or sparse; None for another world."""
    return maze_of(environment)
