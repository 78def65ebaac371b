"""Maze2D data recorded here: walks to goals by the waypoint planner, in the simulator.

A base walks to random goals, an expert to one goal; nothing else differs.
Legend: E episodes, T steps of an episode.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from common_jax.errors import InputError
from reward_jax.data.episodes import Episodes
from reward_jax.tasks.maze.mazes import ENVIRONMENTS, Maze, check_goal, uniform_starts
from reward_jax.tasks.maze.planner import DT, longest_walk, walk

__all__ = ["arrivals", "collect", "rewards", "steps_for"]

ARRIVED = 0.15  # metres from the goal
REWARDED = 0.45  # metres from the goal: the environment's own; asserted in the tests


def collect(maze: Maze, *, goal: Any = None, episodes: int, steps: int, seed: int) -> Episodes:
    """Episodes of `steps` steps: start at rest anywhere, walk to the goal, stay there.

    goal: (x, y) metres, the same in all episodes (an expert's); None: drawn anew for each, uniform
    over the free area as the starts are (the base). steps: at least `longest_walk(maze)`, so that
    every episode arrives, or InputError is raised; `steps_for` adds those of a window.
    Observations are (x, y, vx, vy), actions (fx, fy) in -1 .. 1, as in D4RL's Maze2D; row t holds
    the state and the force applied to it.
    """
    if episodes < 1:
        raise InputError(f"episodes must be 1 or more, not {episodes}")
    if steps < longest_walk(maze):
        raise InputError(
            f"episodes of {steps} steps are too short for the maze {maze.name!r}, whose longest "
            f"walk takes up to {longest_walk(maze)}: raise steps"
        )
    fixed = None if goal is None else check_goal(maze, goal)
    # Two generators: a base and an expert of one seed start at the same places.
    for_starts, for_goals = np.random.default_rng(seed).spawn(2)
    starts = uniform_starts(maze, episodes, for_starts)
    if fixed is None:
        goals = uniform_starts(maze, episodes, for_goals)
    else:
        goals = np.tile(fixed, (episodes, 1))
    states, actions = walk(maze, starts, goals, steps)
    return Episodes(
        observations=states[:, :-1].reshape(-1, 4).astype(np.float32),
        actions=actions.reshape(-1, 2),
        lengths=np.full(episodes, steps),
        about={
            "task": maze.name,
            "environment": ENVIRONMENTS[maze.name],
            "goal": None if fixed is None else fixed.tolist(),
            "seed": seed,
            "dt": DT,
        },
        arrivals=arrivals(states[:, :-1, :2], goals),
        goals=goals.astype(np.float32),
        rewards=rewards(states[:, 1:, :2], goals).reshape(-1),
        terminations=np.zeros(episodes * steps, bool),  # the goal stays, and so may the ball
        truncations=np.tile(np.arange(steps) == steps - 1, episodes),
    )


def rewards(
    positions: Float[np.ndarray, "E T 2"], goals: Float[np.ndarray, "E 2"]
) -> Float[np.ndarray, "E T"]:
    """The environment's sparse rewards of the steps that led to these positions.

    1 within 0.45 m of the goal, else 0.
    """
    away = np.linalg.norm(positions - goals[:, None], axis=-1)
    return (away <= REWARDED).astype(np.float32)


def steps_for(maze: Maze, span: int) -> int:
    """Steps of an episode in which windows of `span` fit at every step of the longest walk."""
    return longest_walk(maze) + span


def arrivals(
    positions: Float[np.ndarray, "E T 2"], goals: Float[np.ndarray, "E 2"]
) -> Int[np.ndarray, " E"]:
    """Steps after which positions stay within 0.15 m of their goals.

    T where the goal is never reached for good.
    """
    away = np.linalg.norm(positions - goals[:, None], axis=-1) > ARRIVED
    steps = away.shape[1]
    return np.where(away.any(axis=1), steps - np.argmax(away[:, ::-1], axis=1), 0)
