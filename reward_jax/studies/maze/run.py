"""The Maze2D study: four mazes, eight goals each, a reward for every goal.

For each maze a base model of walks to random goals; for each goal an expert, the base trained
further on walks to that goal alone; the reward of the two, with its heat map; and plans of the
base steered by it. Beside them: the discriminator, and a null control, the reward of two
checkpoints of one base.

    out/MAZE/{base,null_base,null_reward}.safetensors, null.json
    out/MAZE/goal_K/{expert,reward,discriminator}.safetensors, {result,seconds}.json, maps.npz
    out/MAZE/base/, out/MAZE/goal_K/expert/, ...   metrics of each model's training
    out/results.json, out/report/

What is there is not made again, and a training goes on from its last checkpoint, so that a study
that was stopped goes on where it stood; several processes may take a maze each.
"""

import functools
from collections.abc import Iterator
from typing import Any

from reward_jax.studies.base import Part, Study
from reward_jax.studies.maze.report import write_report
from reward_jax.studies.maze.settings import Config, check
from reward_jax.studies.maze.summary import read_results, summarise
from reward_jax.studies.maze.work import MazeWork
from reward_jax.tasks.maze.task import MazeTask

__all__ = ["STUDY", "Config"]


def _check(config: Config) -> None:
    check(config)
    for name in config.mazes:
        MazeTask(name)
    read_results(config.out, config.scales)  # hours before `summarise` does


def _parts(config: Config) -> Iterator[Part]:
    for name in config.mazes:
        yield Part(MazeTask(name).name, functools.partial(_maze, config, name))


def _maze(config: Config, name: str) -> None:
    work = MazeWork(config, MazeTask(name))
    work.null()
    for index in range(config.goals):
        work.goal(index)


def _summarise(config: Config) -> dict[str, Any]:
    summary = summarise(config.out, config.scales)
    page = write_report(config.out, summary, config.headline_scale)
    print(f"report: {page.resolve()}", flush=True)
    return summary


STUDY = Study(
    Config, _check, _parts, _summarise, free=("mazes", "goals", "out", "save_every", "mesh")
)
