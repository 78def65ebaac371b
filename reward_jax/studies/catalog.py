"""The studies that the command line offers. A study is of a task, and may name it."""

from common_jax.cli.command_line import of_module

__all__ = ["STUDIES"]

STUDIES = {
    "study": of_module(
        "four mazes, eight goals each: a reward and a map for every goal",
        "reward_jax.studies.maze.run",
    ),
}
