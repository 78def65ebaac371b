"""`reward-jax data`: walks in a maze, recorded in D4RL's HDF5 layout, with what made them."""

import dataclasses
import pathlib

from common_jax.cli.options import check_seed
from common_jax.errors import InputError
from common_jax.io.files import check_writable
from common_jax.run import environment
from reward_jax.data import hdf5
from reward_jax.tasks.maze.collect import collect, steps_for
from reward_jax.tasks.maze.mazes import check_goal, goals, maze

__all__ = ["DataConfig", "run_data"]


@dataclasses.dataclass
class DataConfig:
    """Record walks: to random goals for a base, to one goal for an expert.

    Args:
        env: open, umaze, medium or large.
        out: .hdf5 file, in D4RL's layout.
        goal: 0 to 7 for one of the maze's eight goals, or x,y in metres; by default a new random
            goal for each walk.
        episodes: walks.
        horizon: rows of the windows that are to be cut; walks are long enough for them.
        stride: environment steps between rows.
        seed: of starts and goals.
    """

    env: str
    out: str
    goal: str | None = None
    episodes: int = 2000
    horizon: int = 32
    stride: int = 10
    seed: int = 0


def run_data(config: DataConfig) -> pathlib.Path:
    """Collect and write; returns the path."""
    layout = maze(config.env)
    goal = None if config.goal is None else _goal(layout, config.goal)
    out = check_writable(config.out, (".hdf5", ".h5"))
    for name, value in (("horizon", config.horizon), ("stride", config.stride)):
        if value < 1:
            raise InputError(f"{name} must be 1 or more, not {value}")
    check_seed(config.seed)
    steps = steps_for(layout, config.horizon, config.stride)
    episodes = collect(layout, goal=goal, episodes=config.episodes, steps=steps, seed=config.seed)
    hdf5.write(out, episodes, run={"config": dataclasses.asdict(config)} | environment())
    aim = "random goals" if goal is None else f"the goal ({goal[0]:g}, {goal[1]:g})"
    print(f"{config.episodes} walks to {aim}, {config.episodes * steps} steps: {out}")
    return out


def _goal(layout, text: str):
    listed = goals(layout)
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 2:
        return check_goal(layout, numbers)
    if len(numbers) == 1 and numbers[0] in range(len(listed)):
        return listed[int(numbers[0])]
    raise InputError(f"goal {text!r}: give 0 to {len(listed) - 1}, or x,y in metres")
