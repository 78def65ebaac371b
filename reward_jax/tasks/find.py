"""Tasks by name. To add a task: write its class (see `base.Task`), and add its line to `TASKS`."""

import dataclasses
import difflib
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from common_jax.errors import InputError
from reward_jax.data.episodes import Episodes, without_terminations
from reward_jax.data.files import read_episodes
from reward_jax.tasks.base import Task
from reward_jax.tasks.images import task as images
from reward_jax.tasks.locomotion import task as locomotion
from reward_jax.tasks.maze import task as maze
from reward_jax.tasks.obstacles import task as obstacles

__all__ = ["TASKS", "find", "read", "task_and_goal", "task_of"]

# A name, as in files and for --env -> a function that makes the task of that name.
TASKS: Mapping[str, Callable[[str], Task]] = {
    **dict.fromkeys(locomotion.TASKS, locomotion.LocomotionTask),
    **dict.fromkeys(maze.TASKS, maze.MazeTask),
    **dict.fromkeys(obstacles.TASKS, obstacles.ObstaclesTask),
    **dict.fromkeys(images.TASKS, images.ImagesTask),
}
# Each takes an environment's name elsewhere (a Gymnasium id) -> the name of its task, or None.
_KNOWN: tuple[Callable[[str], str | None], ...] = (maze.task_of, locomotion.task_of)
# Terminal states that data of a world without any may seem to have: one a file, of joined files.
_STRAY = 5


@functools.cache
def find(name: str) -> Task:
    """The task of that name; raises InputError that suggests the nearest for another."""
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower(), TASKS, 1, 0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"environment {name!r} is unknown{hint}: choose from {', '.join(TASKS)}")
    return TASKS[name](name)


def task_of(about: Mapping[str, Any]) -> Task:
    """The task that data or a model come from; raises InputError where it is not one of these."""
    name = _name(about)
    if name is None:
        raise InputError("the model's data came from no task of ours; plans cannot be executed")
    return find(name)


def task_and_goal(about: Mapping[str, Any], goal: Any = None) -> tuple[Task, Any]:
    """The task that a model is of, and the goal of its data, or in its place the one given.

    Raises InputError as `task_of` and `Task.goal` do.
    """
    task = task_of(about)
    return task, task.goal(about.get("goal") if goal is None else goal)


def read(source: str | pathlib.Path, *, ends: str = "auto", env: str | None = None) -> Episodes:
    """`read_episodes`, with the task in `about` where the data are of one of these.

    env: the task's name, or a Gymnasium id, where the data do not say (as D4RL's files do not).
    Raises InputError for data that say another, or of other widths than the task's. Where a task
    has no terminal states, a few flags of them are not followed: the episode goes on (each of
    D4RL's files of one such world has one, D4RL issue 107); more than these are another world's.
    """
    episodes = read_episodes(source, ends=ends)
    name = _name(episodes.about)
    if env is not None:
        asked = find(_name({"environment": env}) or env).name
        if name not in (None, asked):
            raise InputError(
                f"{source}: is of {name}, not of {asked}: leave --env out, or give data of {asked}"
            )
        name = asked
    if name is None:
        return episodes
    task = find(name) if name in TASKS else None
    if task is not None and task.widths is not None:
        widths = episodes.observations.shape[1], episodes.actions.shape[1]
        if widths != task.widths:
            raise InputError(
                f"{source}: has {widths[0]} observations and {widths[1]} actions, but "
                f"{task.environment} has {task.widths[0]} and {task.widths[1]}: give data of it"
            )
        if task.terminates and episodes.terminations is None:
            raise InputError(
                f"{source}: has no flags of terminal states, which {task.environment} has: "
                "windows would go on beyond a fall; give data with `terminals`"
            )
    if task is not None and not task.terminates:
        _check_strays(source, task, episodes)
        episodes = without_terminations(episodes)
    return dataclasses.replace(episodes, about=episodes.about | {"task": name})


def _check_strays(source: str | pathlib.Path, task: Task, episodes: Episodes) -> None:
    """InputError for terminal states in numbers, in data of a task that has none."""
    flags = episodes.terminations
    count = 0 if flags is None else int(flags.sum())
    if count <= _STRAY:
        return
    kin = (find(name) for name, make in TASKS.items() if make is TASKS[task.name])
    like = [one.name for one in kin if one.terminates and one.widths == task.widths]
    other = f"give --env {' or '.join(like)} where it is of that, or" if like else "give"
    raise InputError(
        f"{source}: has {count} terminal states, but {task.environment} has none: {other} data of "
        f"{task.name}"
    )


def _name(about: Mapping[str, Any]) -> str | None:
    if named := about.get("task") or about.get("maze"):  # as files of the first format call it
        return named
    environment = about.get("environment")
    return next((name for known in _KNOWN if environment and (name := known(environment))), None)
