"""The four PointMaze mazes of gymnasium-robotics: layouts, goals, starts, a drawing.

Positions are in metres, x to the right and y up, the origin in the middle of the map, as in the
environment. Cells are (row, column), row 0 at the top.
Legend: R rows, C columns, F free cells.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import io
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from common_jax import extras
from common_jax.errors import InputError

if TYPE_CHECKING:
    import gymnasium
    from matplotlib.axes import Axes

__all__ = [
    "BALL",
    "ENVIRONMENTS",
    "Maze",
    "check_goal",
    "draw_maze",
    "environment",
    "goals",
    "maze",
    "maze_of",
    "uniform_starts",
]

ENVIRONMENTS = {
    "open": "PointMaze_Open-v3",
    "umaze": "PointMaze_UMaze-v3",
    "medium": "PointMaze_Medium-v3",
    "large": "PointMaze_Large-v3",
}
BALL = 0.1  # radius of the ball, metres
GOALS = 8
START_MARGIN = 0.15  # metres between a start (or a random goal) and the nearest wall
# Metres between a goal and the borders of its cell, also those to free cells: in which cell a map
# peaks then does not depend on the width of a bin.
GOAL_MARGIN = 0.3


@dataclasses.dataclass(frozen=True, eq=False)
class Maze:
    """A layout. size: of a cell, metres."""

    name: str
    walls: Bool[np.ndarray, "R C"]
    size: float

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of the map, its outer walls included; metres."""
        rows, columns = self.walls.shape
        half = columns * self.size / 2, rows * self.size / 2
        return -half[0], half[0], -half[1], half[1]

    @functools.cached_property
    def centres(self) -> Float[np.ndarray, "R C 2"]:
        """Centres of all cells, metres."""
        rows, columns = np.indices(self.walls.shape)
        left, _, _, top = self.extent
        return np.stack(
            [left + (columns + 0.5) * self.size, top - (rows + 0.5) * self.size], axis=-1
        )

    @functools.cached_property
    def free(self) -> Int[np.ndarray, "F 2"]:
        """Cells (row, column) without a wall, row by row."""
        return np.argwhere(~self.walls)

    def cell_of(self, xy: Float[np.ndarray, "... 2"]) -> Int[np.ndarray, "... 2"]:
        """Cells (row, column) of points; beyond the map for points outside it."""
        xy = np.asarray(xy, np.float64)
        left, _, _, top = self.extent
        cell = np.stack([(top - xy[..., 1]), (xy[..., 0] - left)], axis=-1) / self.size
        return np.floor(cell).astype(int)

    def inside(self, xy: Float[np.ndarray, "... 2"]) -> Bool[np.ndarray, "..."]:
        """Whether points lie in free cells."""
        cell = self.cell_of(xy)
        on_map = np.all((cell >= 0) & (cell < self.walls.shape), axis=-1)
        row, column = np.moveaxis(np.where(on_map[..., None], cell, 0), -1, 0)
        return on_map & ~self.walls[row, column]

    def clearance(self, xy: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, "..."]:
        """Metres from points to the nearest wall; 0 in walls and outside.

        A ball touches no wall where this is more than its radius, BALL.
        """
        xy = np.asarray(xy, np.float64)
        beyond = np.abs(xy[..., None, :] - self.centres[self.walls]) - self.size / 2
        distance = np.linalg.norm(np.maximum(beyond, 0.0), axis=-1).min(axis=-1)
        return np.where(self.inside(xy), distance, 0.0)


@functools.cache
def maze(name: str) -> Maze:
    """The maze "open", "umaze", "medium" or "large"; raises InputError for another name."""
    if name not in ENVIRONMENTS:
        near = difflib.get_close_matches(name.lower(), ENVIRONMENTS, 1, 0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(
            f"environment {name!r} is unknown{hint}: choose from {', '.join(ENVIRONMENTS)}"
        )
    with environment(name) as env:
        layout: Any = env.unwrapped
        walls = np.array([[cell == 1 for cell in row] for row in layout.maze.maze_map])
        size = float(layout.maze.maze_size_scaling)
    walls.setflags(write=False)
    return Maze(name, walls, size)


def maze_of(environment: str | None) -> str | None:
    """The name here of a PointMaze id, any version, dense or sparse rewards; else None."""
    bare = re.sub(r"(Dense)?-v\d+$", "", environment or "")
    return next((k for k, v in ENVIRONMENTS.items() if v.rpartition("-v")[0] == bare), None)


@contextlib.contextmanager
def environment(name: str) -> Iterator["gymnasium.Env"]:
    """The Gymnasium environment of a maze: a continuing task whose goal stays where it is."""
    with extras.named():
        import gymnasium

        importlib.import_module("mujoco")  # here, for our message where it is missing

    if not sys.modules.get("gymnasium_robotics"):
        # Its import prints advice about environments that are not used here.
        with contextlib.redirect_stderr(io.StringIO()), extras.named():
            import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
    with contextlib.closing(
        gymnasium.make(
            ENVIRONMENTS[name],
            continuing_task=True,
            reset_target=False,
            max_episode_steps=sys.maxsize,
        )
    ) as env:
        made: Any = env.unwrapped
        try:
            yield env
        finally:
            pathlib.Path(made.tmp_xml_file_path).unlink(missing_ok=True)


def goals(maze: Maze, count: int = GOALS) -> Float[np.ndarray, "count 2"]:
    """Goals far from one another, metres; always the same ones.

    Farthest-point sampling over points 0.3 m or more from the borders of their cells (UMaze has
    7 free cells: goals are points, not cells). The first is the point farthest from the middle.
    """
    half = maze.size / 2 - GOAL_MARGIN
    offsets = np.stack(np.meshgrid(*[np.linspace(-half, half, 5)] * 2), axis=-1).reshape(-1, 2)
    centres = maze.centres[tuple(maze.free.T)]
    # Rounded, so that equal distances are equal on every machine; argmax takes the first.
    points = (centres[:, None] + offsets).reshape(-1, 2).round(6)
    nearest = np.linalg.norm(points - points.mean(axis=0), axis=-1)
    chosen = []
    for index in range(count):
        best = int(np.argmax(nearest.round(6)))
        chosen.append(points[best])
        to_best = np.linalg.norm(points - points[best], axis=-1)
        nearest = np.minimum(nearest, to_best) if index else to_best
    return np.stack(chosen)


def check_goal(maze: Maze, goal: Any) -> Float[np.ndarray, "2"]:
    """A goal as float64, metres; raises InputError where the ball cannot be."""
    xy = np.asarray(goal, np.float64)
    if xy.shape != (2,) or not np.isfinite(xy).all():
        raise InputError(f"goal {goal}: give x and y in metres, as in (1.0, -0.5)")
    place = f"goal ({xy[0]:g}, {xy[1]:g})"
    near = maze.centres[tuple(maze.free.T)]
    near = near[np.argmin(np.linalg.norm(near - xy, axis=-1))]
    mend = f"the nearest free cell is around ({near[0]:g}, {near[1]:g})"
    left, right, bottom, top = maze.extent
    if not (left <= xy[0] <= right and bottom <= xy[1] <= top):
        raise InputError(
            f"{place} lies outside the maze {maze.name!r}, which spans x {left:g} to {right:g} "
            f"and y {bottom:g} to {top:g} m; {mend}"
        )
    if not maze.inside(xy):
        raise InputError(f"{place} lies in a wall of the maze {maze.name!r}; {mend}")
    if maze.clearance(xy) <= BALL:
        raise InputError(
            f"{place} is {maze.clearance(xy):.2g} m from a wall of the maze {maze.name!r}, nearer "
            f"than the ball's radius ({BALL} m); {mend}"
        )
    return xy


def uniform_starts(maze: Maze, n: int, rng: np.random.Generator) -> Float[np.ndarray, "n 2"]:
    """Points uniform over the free area, 0.15 m or more from the walls; metres."""
    points = np.empty((0, 2))
    centres = maze.centres[tuple(maze.free.T)]
    while len(points) < n:
        cells = centres[rng.integers(len(centres), size=n)]
        drawn = cells + rng.uniform(-0.5, 0.5, (n, 2)) * maze.size
        points = np.concatenate([points, drawn[maze.clearance(drawn) >= START_MARGIN]])
    return points[:n]


def draw_maze(axes: "Axes", maze: Maze) -> None:
    """Draw the walls; axes in metres, of one scale."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    corners = maze.centres[maze.walls] - maze.size / 2
    patches = [Rectangle((x, y), maze.size, maze.size) for x, y in corners]
    # The edge hides the hairlines that renderers leave between neighbours.
    axes.add_collection(
        PatchCollection(patches, facecolor="#5f6b76", edgecolor="#5f6b76", linewidth=0.5)
    )
    left, right, bottom, top = maze.extent
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="x (m)", ylabel="y (m)")
    axes.set_aspect("equal")
    axes.grid(False)
