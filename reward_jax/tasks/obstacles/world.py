"""A point that moves among discs, in closed form: a world without a simulator.

Quick and exact, for tests and as a template of a task.
Legend: B points, T steps, H rows of a plan.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["DT", "HALF", "SPEED", "WORLDS", "World", "follow", "longest_walk", "move", "walk"]

HALF = 2.0  # metres from the middle to each border
SPEED = 1.0  # metres a second, of a walk; plans are followed at 1.5 times this at most
DT = 0.1  # seconds a step
MARGIN = 0.1  # metres that a walk keeps from the discs


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Discs that do not touch; centres and radii in metres."""

    name: str
    centres: Float[np.ndarray, "discs 2"]
    radii: Float[np.ndarray, " discs"]

    def clearance(self, xy: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, "..."]:
        """Metres from points to the nearest disc or border; below 0 in one or outside."""
        xy = np.asarray(xy, np.float64)
        discs = np.linalg.norm(xy[..., None, :] - self.centres, axis=-1) - self.radii
        return np.minimum(discs.min(axis=-1), (HALF - np.abs(xy)).min(axis=-1))

    def uniform(self, count: int, rng: np.random.Generator) -> Float[np.ndarray, "count 2"]:
        """Points uniform over the free area."""
        points = np.empty((0, 2))
        while len(points) < count:
            drawn = rng.uniform(-HALF, HALF, (count, 2))
            points = np.concatenate([points, drawn[self.clearance(drawn) > MARGIN]])
        return points[:count]


def _world(name: str, centres: Any, radius: float) -> World:
    centres = np.array(centres, np.float64)
    return World(name, centres, np.full(len(centres), radius))


WORLDS = {
    "disc": _world("disc", [(0, 0)], 0.8),
    "discs": _world("discs", [(0.9, 0.9), (-0.9, 0.9), (0.9, -0.9), (-0.9, -0.9)], 0.5),
}


def longest_walk(world: World) -> int:
    """Steps in which every walk has arrived: the diagonal, and half around each disc on it."""
    metres = 2 * np.sqrt(2) * HALF + np.pi * (world.radii + MARGIN).sum()
    return int(np.ceil(metres / (SPEED * DT)))


def move(
    world: World, xy: Float[np.ndarray, "B 2"], velocities: Float[np.ndarray, "B 2"], speed: float
) -> Float[np.ndarray, "B 2"]:
    """Points after one step with these velocities, `speed` at most; discs push points out."""
    pace = np.linalg.norm(velocities, axis=1, keepdims=True)
    xy = xy + DT * velocities * np.minimum(1.0, speed / np.maximum(pace, 1e-12))
    for centre, radius in zip(world.centres, world.radii, strict=True):
        away = xy - centre
        distance = np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-12)
        xy = np.where(distance < radius, centre + away * radius / distance, xy)
    return xy.clip(-HALF, HALF)


def walk(
    world: World, starts: Float[np.ndarray, "B 2"], goals: Float[np.ndarray, "B 2"], steps: int
) -> tuple[Float[np.ndarray, "B T+1 2"], Float[np.ndarray, "B T 2"]]:
    """Walk from starts to goals, around discs, and stay there.

    steps: T. Returns positions, metres, and velocities, metres a second.
    """
    starts, goals = np.asarray(starts, np.float64), np.asarray(goals, np.float64)
    positions = np.empty((len(starts), steps + 1, 2))
    velocities = np.empty((len(starts), steps, 2))
    positions[:, 0] = starts
    for t in range(steps):
        xy = positions[:, t]
        left = np.linalg.norm(goals - xy, axis=1, keepdims=True)
        velocities[:, t] = _heading(world, xy, goals) * np.minimum(SPEED, left / DT)
        positions[:, t + 1] = move(world, xy, velocities[:, t], SPEED)
    return positions, velocities


def follow(
    world: World, plans: Float[np.ndarray, "B H 2"], starts: Float[np.ndarray, "B 2"], stride: int
) -> Float[np.ndarray, "B 2"]:
    """Where points end that follow plans, a row every `stride` steps, and then stay."""
    xy = np.asarray(starts, np.float64)
    steps = (plans.shape[1] - 1) * stride
    for t in range(steps + 10):
        tick = min(t + 1, steps) / stride
        row = min(int(tick), plans.shape[1] - 2)
        target = plans[:, row] + (tick - row) * (plans[:, row + 1] - plans[:, row])
        xy = move(world, xy, (target - xy) / DT, 1.5 * SPEED)
    return xy


def _heading(
    world: World, xy: Float[np.ndarray, "B 2"], goals: Float[np.ndarray, "B 2"]
) -> Float[np.ndarray, "B 2"]:
    """Unit vectors to the goal, or along the tangent of the nearest disc on the way."""
    way = goals - xy
    length = np.maximum(np.linalg.norm(way, axis=1), 1e-12)
    heading, nearest = way / length[:, None], np.full(len(xy), np.inf)
    straight = heading
    for centre, radius in zip(world.centres, world.radii + MARGIN, strict=True):
        to = centre - xy
        distance = np.linalg.norm(to, axis=1)
        along = (to * straight).sum(axis=1)
        across = straight[:, 0] * to[:, 1] - straight[:, 1] * to[:, 0]
        # A goal inside the margin is walked to: there the margin is smaller.
        grown = np.minimum(radius, np.linalg.norm(goals - centre, axis=1))
        blocks = (along > 0) & (along < length) & (np.abs(across) < grown) & (distance < nearest)
        angle = np.arcsin(np.minimum(1.0, grown / np.maximum(distance, 1e-12)))
        turn = np.arctan2(to[:, 1], to[:, 0]) - np.where(across >= 0, angle, -angle)
        tangent = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        heading = np.where(blocks[:, None], tangent, heading)
        nearest = np.where(blocks, distance, nearest)
    return heading
