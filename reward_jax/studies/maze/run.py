"""The Maze2D study: four mazes, eight goals each, a reward for every goal.

For each maze a base model of walks to random goals; for each goal an expert, the base trained
further on walks to that goal alone; the reward of the two, with its heat map; and plans of the
base steered by it. Beside them: the discriminator, and a null control, the reward of two
checkpoints of one base.

    out/MAZE/{base,null_base,null_reward}.safetensors, null.json
    out/MAZE/goal_K/{expert,reward,discriminator}.safetensors, result.json, maps.npz
    out/MAZE/base/, out/MAZE/goal_K/expert/, ...   metrics of each model's training
    out/results.json, out/report/

What is there is not made again, and a training goes on from its last checkpoint, so that a study
that was stopped goes on where it stood; several processes may take a maze each.
"""

from typing import Any

from common_jax import resume
from common_jax.run import check_directory, note_run
from reward_jax.studies.maze.report import write_report
from reward_jax.studies.maze.settings import Config, check, plain
from reward_jax.studies.maze.summary import read_results, summarise
from reward_jax.studies.maze.work import MazeWork
from reward_jax.tasks.maze.task import MazeTask

__all__ = ["Config", "run"]

_FREE = ("mazes", "goals", "out", "save_every")  # may change from start to start


def run(config: Config) -> dict[str, Any]:
    """Do what is not done yet; writes and returns the summary (results.json)."""
    check(config)
    tasks = [MazeTask(name) for name in config.mazes]
    settings = plain(config)
    check_directory(config.out, resume=True)
    resume.check(config.out, settings, free=_FREE)
    read_results(config.out, config.scales)  # hours before `summarise` does
    note_run(config.out, settings)
    resume.settle(config.out, settings, free=_FREE)
    for task in tasks:
        with resume.alone(config.out / task.name):
            work = MazeWork(config, task)
            work.null()
            for index in range(config.goals):
                work.goal(index)
    summary = summarise(config.out, config.scales)
    page = write_report(config.out, summary, config.headline_scale)
    print(f"report: {page.resolve()}", flush=True)
    return summary
