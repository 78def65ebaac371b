"""The waypoint planner: shortest paths in a maze, and a controller that follows them.

A walk is a polyline over centres of cells, along which a target moves at constant speed, smoothed
in time; a PD controller follows the target. Plans of a diffusion model are executed by the same
controller.

Legend: B walks, F free cells, K corners of a path, T environment steps, H rows of a plan, N lines.
"""

import functools

import numpy as np
from jaxtyping import Bool, Float, Int

from common_jax.errors import InputError
from reward_jax.tasks.maze.mazes import Maze
from reward_jax.tasks.maze.simulator import Simulator

__all__ = ["SPEED", "follow", "longest_walk", "shortest_paths", "targets", "track", "walk"]

SPEED = 2.5  # of the target, metres a second
SMOOTHING = 30  # steps over which its position is averaged: it starts, turns and stops gently
# Force for each metre, and for each metre a second: at 24 m/s^2 for a unit of force this is a
# critically damped controller of 12 rad/s.
POSITION_GAIN = 6.0
VELOCITY_GAIN = 1.0
COMFORT = 0.3  # metres from the walls along a path, unless it starts or ends nearer to one
DT = 0.01  # seconds a step; asserted against the environment's in the tests


def walk(
    maze: Maze, starts: Float[np.ndarray, "B 2"], goals: Float[np.ndarray, "B 2"], steps: int
) -> tuple[Float[np.ndarray, "B T+1 4"], Float[np.ndarray, "B T 2"]]:
    """Walk from starts to goals and stay there.

    steps: T. Returns states, float64, and actions, float32.
    """
    starts = np.asarray(starts, np.float64)
    references = targets(shortest_paths(maze, starts, goals), steps)
    return track(maze, np.concatenate([starts, np.zeros_like(starts)], axis=1), references)


def follow(
    maze: Maze,
    plans: Float[np.ndarray, "B H 2"],
    starts: Float[np.ndarray, "B 4"],
    stride: int,
    hold: int = 50,
) -> Float[np.ndarray, "B steps 2"]:
    """Execute planned positions in the simulator.

    plans: metres, a position every `stride` environment steps, the first the start's;
    between them the target moves on a straight line, and at the end it stays `hold` steps.
    starts: states. Returns the positions visited, (H - 1) * stride + hold + 1 for each row.
    Raises InputError for plans of another shape, or not finite.
    """
    plans = np.asarray(plans, np.float64)
    if plans.ndim != 3 or plans.shape[-1] != 2 or not np.isfinite(plans).all():
        raise InputError(f"plans must be finite positions [B, H, 2], not of shape {plans.shape}")
    ticks = np.arange((plans.shape[1] - 1) * stride + hold + 1) / stride
    before = np.minimum(ticks.astype(int), plans.shape[1] - 2)
    share = np.minimum(ticks - before, 1.0)[:, None]
    references = (1 - share) * plans[:, before] + share * plans[:, before + 1]
    states, _ = track(maze, starts, references)
    return states[..., :2]


def track(
    maze: Maze, starts: Float[np.ndarray, "B 4"], references: Float[np.ndarray, "B T+1 2"]
) -> tuple[Float[np.ndarray, "B T+1 4"], Float[np.ndarray, "B T 2"]]:
    """Follow target positions, the first at the time of the starts.

    Returns states, float64, and actions, float32.
    """
    simulator = Simulator(maze, starts)
    count, times, _ = references.shape
    states = np.empty((count, times, 4))
    actions = np.empty((count, times - 1, 2), np.float32)
    states[:, 0] = simulator.states
    velocities = np.diff(references, axis=1) / simulator.dt
    for t in range(times - 1):
        position, velocity = states[:, t, :2], states[:, t, 2:]
        force = POSITION_GAIN * (references[:, t] - position)
        force += VELOCITY_GAIN * (velocities[:, t] - velocity)
        actions[:, t] = np.clip(force, -1.0, 1.0)
        states[:, t + 1] = simulator.step(actions[:, t])
    return states, actions


def targets(paths: list[Float[np.ndarray, "K 2"]], steps: int) -> Float[np.ndarray, "B steps+1 2"]:
    """Positions of a target that walks along each path, then stays."""
    distance = SPEED * DT * np.arange(steps + 1)
    moving = np.empty((len(paths), steps + 1, 2))
    for row, path in zip(moving, paths, strict=True):
        along = np.concatenate([[0.0], np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()])
        for axis in range(2):
            row[:, axis] = np.interp(distance, along, path[:, axis])
    # The mean over the last SMOOTHING steps; before the walk the target stood at the start.
    padded = np.concatenate([np.repeat(moving[:, :1], SMOOTHING, axis=1), moving], axis=1)
    sums = padded.cumsum(axis=1)
    return (sums[:, SMOOTHING:] - sums[:, :-SMOOTHING]) / SMOOTHING


def longest_walk(maze: Maze) -> int:
    """Steps in which every walk of this maze has arrived (an upper bound)."""
    between, _ = _routes(maze)
    # Start and goal lie at most half a cell's diagonal from a centre.
    metres = between.max() + np.sqrt(2) * maze.size
    return int(np.ceil(metres / (SPEED * DT))) + 2 * SMOOTHING


def shortest_paths(
    maze: Maze, starts: Float[np.ndarray, "B 2"], goals: Float[np.ndarray, "B 2"]
) -> list[Float[np.ndarray, "K 2"]]:
    """Shortest polylines from starts to goals, both ends included.

    They lead over centres of cells, and straight to the goal where the line keeps COMFORT metres
    from the walls (or as much as its ends do). Raises InputError for an end inside a wall.
    """
    starts, goals = (np.asarray(x, np.float64).reshape(-1, 2) for x in (starts, goals))
    for what, points in (("start", starts), ("goal", goals)):
        if (bad := np.flatnonzero(~maze.inside(points))).size:
            x, y = points[bad[0]]
            raise InputError(f"{what} ({x:g}, {y:g}) is in no free cell of the maze {maze.name!r}")
    centres = maze.centres[tuple(maze.free.T)]
    between, onward = _routes(maze)
    paths = []
    for start, goal, direct in zip(starts, goals, _visible(maze, starts, goals), strict=True):
        if direct:
            paths.append(np.stack([start, goal]))
            continue
        leave = _reach(maze, start, centres)
        arrive = _reach(maze, goal, centres)
        total = leave[:, None] + between + arrive
        cell, last = np.unravel_index(np.argmin(total), total.shape)
        corners = [start, centres[cell]]
        while cell != last:
            cell = onward[cell, last]
            corners.append(centres[cell])
        paths.append(np.stack([*corners, goal]))
    return paths


@functools.lru_cache(maxsize=16)
def _routes(maze: Maze) -> tuple[Float[np.ndarray, "F F"], Int[np.ndarray, "F F"]]:
    """Metres between the centres of free cells, and the next cell on the way."""
    centres = maze.centres[tuple(maze.free.T)]
    count = len(centres)
    metres = np.stack([_reach(maze, centre, centres) for centre in centres])
    onward = np.tile(np.arange(count), (count, 1))
    for via in range(count):  # Floyd and Warshall
        detour = metres[:, via, None] + metres[via]
        shorter = detour < metres - 1e-9
        onward = np.where(shorter, onward[:, via, None], onward)
        metres = np.where(shorter, detour, metres)
    return metres, onward


def _reach(
    maze: Maze, point: Float[np.ndarray, "2"], centres: Float[np.ndarray, "F 2"]
) -> Float[np.ndarray, " F"]:
    """Metres from a point straight to each centre; infinite where walls are between."""
    open_way = _visible(maze, np.broadcast_to(point, centres.shape), centres)
    return np.where(open_way, np.linalg.norm(centres - point, axis=1), np.inf)


def _visible(
    maze: Maze, starts: Float[np.ndarray, "N 2"], ends: Float[np.ndarray, "N 2"]
) -> Bool[np.ndarray, " N"]:
    """Whether straight lines from starts to ends keep their distance from walls.

    That distance, measured along the axes, is COMFORT, or less where an end is nearer to a wall.
    """
    walls, half = maze.centres[maze.walls], maze.size / 2

    def room(points: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, " N"]:
        return (np.abs(points[:, None] - walls).max(axis=-1) - half).min(axis=-1)

    distance = np.minimum(COMFORT, np.minimum(room(starts), room(ends))) - 1e-9
    grown = (half + distance)[:, None, None]
    offset, step = (starts[:, None] - walls), (ends - starts)[:, None]
    # The times at which a line enters and leaves each grown wall, along each axis: slab test.
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (-grown - offset) / step, (grown - offset) / step
    parallel = np.broadcast_to(step == 0, offset.shape)
    between = np.abs(offset) < grown
    enter = np.where(parallel, np.where(between, -np.inf, np.inf), np.minimum(one, other))
    leave = np.where(parallel, np.where(between, np.inf, -np.inf), np.maximum(one, other))
    enter, leave = enter.max(axis=-1), leave.min(axis=-1)
    hit = (enter < leave) & (enter < 1) & (leave > 0)
    return ~hit.any(axis=-1)
