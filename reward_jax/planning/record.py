"""Episodes of a task, recorded to a file or a Minari dataset, with what made them."""

import dataclasses
import pathlib

from common_jax.cli.options import SeedOption
from common_jax.cli.ranges import PositiveInt, check_ranges
from common_jax.run import environment
from reward_jax.data.episodes import Episodes
from reward_jax.data.files import check_output, write_episodes
from reward_jax.data.trajectory.windows import WindowSize
from reward_jax.tasks.base import TaskOption
from reward_jax.tasks.find import find

__all__ = ["RecordOptions", "Recorded", "record"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordOptions(SeedOption, WindowSize, TaskOption):
    """Record episodes of a task: of a base, or of an expert, which has a goal.

    They are long enough for the windows (horizon, stride) that are to be cut from them.

    Args:
        out: .hdf5 file, in D4RL's layout; or a Minari dataset: a folder, or an id as in
            minari:NAMESPACE/NAME-v0.
        goal: what the expert wants: a number among the task's own goals, from 0, or as the task
            puts it (x,y in metres for one in a plane); by default the base's data.
        episodes: how many.
        policies: a file or a run of `reward-jax policy`, which acts in place of the policies that
            are shipped; of robots alone.
    """

    out: str
    goal: str | tuple[float, ...] | None = None
    episodes: PositiveInt = 2000
    policies: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """Episodes, and the file or folder that they are in. what: they are, in a few words."""

    path: pathlib.Path
    episodes: Episodes
    what: str

    def __str__(self) -> str:
        count, steps = len(self.episodes.lengths), len(self.episodes.observations)
        return f"{count} {self.what}, {steps} steps: {self.path}"


def record(options: RecordOptions) -> Recorded:
    """Record and write; raises InputError, before anything is recorded, for what cannot be."""
    check_ranges(options)
    task = find(options.env)
    if options.policies is not None:
        task = task.with_policies(options.policies)
    goal = None if options.goal is None else task.goal(options.goal)
    check_output(options.out)
    episodes = task.record(
        episodes=options.episodes, span=options.span, seed=options.seed, goal=goal
    )
    about = {"config": dataclasses.asdict(options)} | environment()
    out = write_episodes(options.out, episodes, run=about)
    return Recorded(out, episodes, task.describe(goal))
