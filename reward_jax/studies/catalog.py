"""The studies that the command line offers. A study is of a task, and may name it."""

from collections.abc import Callable
from typing import Any

from common_jax.cli.command_line import Command

__all__ = ["STUDIES"]

_Loaded = tuple[type, Callable[[Any], Any]]


def _study() -> _Loaded:
    from reward_jax.studies.maze.run import run_maze_study
    from reward_jax.studies.maze.settings import MazeStudyConfig

    return MazeStudyConfig, run_maze_study


def _demo() -> _Loaded:
    from reward_jax.studies.maze.demo import DemoConfig, run_demo

    return DemoConfig, run_demo


STUDIES = {
    "study": Command("four mazes, eight goals each: a reward and a map for every goal", _study),
    "demo": Command("extract a reward from the shipped models and write a report", _demo),
}
