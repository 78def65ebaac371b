"""`reward-jax data`: episodes of a task, recorded in D4RL's HDF5 layout, with what made them."""

import dataclasses
import pathlib

from common_jax.cli.ranges import PositiveInt, Seed, check_ranges
from common_jax.io.files import check_writable
from common_jax.run import environment
from reward_jax.data import hdf5
from reward_jax.data.trajectory.windows import WindowSize
from reward_jax.tasks.find import find

__all__ = ["Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(WindowSize):
    """Record episodes of a task: of a base, or of an expert, which has a goal.

    They are long enough for the windows (horizon, stride) that are to be cut from them.

    Args:
        env: the task, by name; a name that is none lists them.
        out: .hdf5 file, in D4RL's layout.
        goal: what the expert wants: a number among the task's own goals, from 0, or as the task
            puts it (x,y in metres for one in a plane); by default the base's data.
        episodes: how many.
        seed: of starts and goals.
    """

    env: str
    out: str
    goal: str | tuple[float, ...] | None = None
    episodes: PositiveInt = 2000
    seed: Seed = 0


def run(config: Config) -> pathlib.Path:
    """Record and write; returns the path."""
    check_ranges(config)
    task = find(config.env)
    goal = None if config.goal is None else task.goal(config.goal)
    out = check_writable(config.out, (".hdf5", ".h5"))
    episodes = task.record(episodes=config.episodes, span=config.span, seed=config.seed, goal=goal)
    hdf5.write(out, episodes, run={"config": dataclasses.asdict(config)} | environment())
    steps = len(episodes.observations)
    print(f"{config.episodes} {task.describe(goal)}, {steps} steps: {out}")
    return out
