"""A point among obstacles as a task: the smallest whole example of the contract.

Legend: B plans, H rows of a plan, O observation width.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Key

from common_jax.errors import InputError
from reward_jax.data.episodes import Episodes
from reward_jax.tasks.base import Captions, Measure, Outcome, Planner, Rollout, Task
from reward_jax.tasks.obstacles.world import DT, HALF, WORLDS, World, follow, longest_walk, walk
from reward_jax.tasks.plane import Plane, draw_paths, read_point

__all__ = ["NEAR", "TASKS", "ObstaclesPlane", "ObstaclesTask"]

NEAR = 0.4  # metres; nearer than this counts as at the goal
TASKS = tuple(WORLDS)  # names


class ObstaclesPlane(Plane):
    """The square, metres. A peak is at its goal when it lies within 0.4 m."""

    extent = (-HALF, HALF, -HALF, HALF)
    place = "surroundings"

    def __init__(self, world: World) -> None:
        self.world = world

    def positions(self, observations: Float[np.ndarray, "... O"]) -> Float[np.ndarray, "... 2"]:
        return observations[..., :2]

    def same_place(self, a: Float[np.ndarray, "2"], b: Float[np.ndarray, "2"]) -> bool:
        return bool(np.linalg.norm(a - b) < NEAR)

    def draw(self, axes: Any) -> None:
        from matplotlib.patches import Circle

        for centre, radius in zip(self.world.centres, self.world.radii, strict=True):
            axes.add_patch(Circle(centre, radius, color="#5f6b76"))
        left, right, bottom, top = self.extent
        axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="x (m)", ylabel="y (m)")
        axes.set_aspect("equal")


class ObstaclesTask(Task):
    """One arrangement of discs. Observations are (x, y), actions velocities."""

    measures = (
        Measure("planned", "as planned", "share of plans that end at the goal", executed=False),
        Measure("reached", "executed", "share of walks that end at the goal", executed=True),
        Measure(
            "clear", "positions off the discs", "share of planned positions off the discs",
            executed=False, digits=3,
        ),
    )  # fmt: skip
    captions = Captions(
        story="Two diffusion models plan ways around obstacles: the base to anywhere, the expert "
        "to one goal.",
        base="Ways to random goals: what it was trained on.",
        expert="Its own plans, from the starts used below.",
        measured=f"Shares of plans that end within {NEAR:g} m of the goal: as planned, and when "
        "the point follows the plan.",
        alt_base="ways that the base learned",
        alt_expert="plans of the expert",
    )

    def __init__(self, name: str) -> None:
        self.name, self.world = name, WORLDS[name]
        self.plane: ObstaclesPlane = ObstaclesPlane(self.world)

    def record(self, *, episodes: int, span: int, seed: int, goal: Any = None) -> Episodes:
        if episodes < 1:
            raise InputError(f"episodes must be 1 or more, not {episodes}")
        for_starts, for_goals = np.random.default_rng(seed).spawn(2)
        starts = self.world.uniform(episodes, for_starts)
        if goal is None:
            goals = self.world.uniform(episodes, for_goals)
        else:
            goals = np.tile(self.goal(goal), (episodes, 1))
        steps = longest_walk(self.world) + span
        positions, velocities = walk(self.world, starts, goals, steps)
        led_to, positions = positions[:, 1:], positions[:, :-1]
        reached = np.linalg.norm(led_to - goals[:, None], axis=-1) < NEAR
        away = np.linalg.norm(positions - goals[:, None], axis=-1) > NEAR / 2
        return Episodes(
            observations=positions.reshape(-1, 2).astype(np.float32),
            actions=velocities.reshape(-1, 2).astype(np.float32),
            lengths=np.full(episodes, steps),
            about={
                "task": self.name,
                "goal": None if goal is None else goals[0].tolist(),
                "seed": seed,
                "dt": DT,
            },
            arrivals=away.sum(axis=1),
            goals=goals.astype(np.float32),
            rewards=reached.reshape(-1).astype(np.float32),
            terminations=np.zeros(episodes * steps, bool),
            truncations=np.tile(np.arange(steps) == steps - 1, episodes),
        )

    def goals(self) -> list[Any]:
        return [[x, y] for x in (-1.7, 1.7) for y in (-1.7, 1.7)]

    def goal(self, given: Any) -> list[float]:
        """0 to 3 for one of `goals()`, "x,y", or [x, y] in metres."""
        x, y = read_point(given, self.goals())
        if not self.world.clearance(np.array([x, y])) > 0:
            raise InputError(f"goal ({x:g}, {y:g}) lies in a disc, or outside: name another")
        return [x, y]

    def describe(self, goal: Any) -> str:
        return "ways to random goals" if goal is None else f"ways to the goal {tuple(goal)}"

    def starts(self, count: int, seed: int) -> Float[np.ndarray, "count 2"]:
        """Points uniform over the free area."""
        return self.world.uniform(count, np.random.default_rng(seed))

    def execute(
        self,
        planner: Planner,
        starts: Float[np.ndarray, "B 2"],
        *,
        key: Key[Array, ""],
        goal: Any,
        simulate: bool = True,
        rollout: Rollout | None = None,
    ) -> Outcome:
        """Whether plans, and the points that follow them, end within 0.4 m of the goal."""
        plans = planner(starts, key)
        xy = plans.observations  # positions, and nothing else

        def near(last: Float[np.ndarray, "B 2"]) -> Bool[np.ndarray, " B"]:
            return np.linalg.norm(last - np.asarray(goal), axis=-1) < NEAR

        reached = near(follow(self.world, xy, starts, plans.stride)) if simulate else None
        clear = (self.world.clearance(xy) >= 0).mean(axis=1)
        return Outcome({"planned": near(xy[:, -1]), "reached": reached, "clear": clear}, xy)

    def draw(
        self, axes: Any, shown: Float[np.ndarray, "B H 2"], *, goal: Any, color: str = "#0072b2"
    ) -> None:
        self.plane.draw(axes)
        draw_paths(axes, shown, goal=goal, color=color)

    def recorded(self, observations: Float[np.ndarray, "B H 2"]) -> Float[np.ndarray, "B H 2"]:
        return observations

    def summarise(self, means: dict[str, float | None]) -> str:
        planned, reached = f"{means['planned']:.2f} of plans end at the goal", means["reached"]
        return planned if reached is None else f"{planned}, {reached:.2f} of the walks"
