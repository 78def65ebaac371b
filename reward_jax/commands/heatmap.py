"""`reward-jax heatmap`: where a reward is high, drawn in the plane of its task."""

import dataclasses

import jax
import numpy as np

from common_jax.cli.options import DeviceOption, SeedOption
from common_jax.cli.ranges import NonNegativeInt, check_ranges
from common_jax.io.files import atomic, write_arrays, write_json
from common_jax.mesh import mesh_for
from common_jax.run import check_run, held_run
from reward_jax.data.checkpoint import load_guide
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.planning.fit import window_source
from reward_jax.planning.maps import check_step, map_of, plane_of
from reward_jax.planning.options import EpisodesOption, FolderOption, GoalOption
from reward_jax.report.figures import map_figure
from reward_jax.tasks.find import read, task_and_goal
from reward_jax.tasks.plane import MapOptions, Peak

__all__ = ["Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SeedOption, DeviceOption, FolderOption, GoalOption, MapOptions, EpisodesOption):
    """Draw the heat map of a reward over the positions that the base visits.

    Writes heatmap.png, heatmap.json (peak, goal, distance) and heatmap.npz.

    Args:
        reward: a reward or a discriminator, a file or a run.
        t: diffusion step at which windows are scored.
    """

    reward: str
    t: NonNegativeInt = 0


def run(config: Config) -> None:
    """Score, draw, write; prints the peak against the goal."""
    check_ranges(config)
    check_run(config.out, "heatmap", dataclasses.asdict(config))
    mesh = mesh_for(dataclasses.asdict(config.mesh))
    guide = load_guide(config.reward, TrajectorySpace, mesh)
    task, goal = task_and_goal(guide.space.about, config.goal)
    plane = plane_of(task)
    check_step(guide, config.t)
    episodes = read(config.data, ends=config.cut.ends, env=config.env)
    source = window_source(episodes, guide.space, config.cut.padding)
    with held_run(config.out, "heatmap", dataclasses.asdict(config)):
        rows = np.asarray(source.sample(jax.random.key(config.seed), config.windows))
        found = map_of(plane, guide, rows, bins=config.bins, t=config.t, mesh=mesh)
        peak = Peak.of(found, plane, goal)

        figure = map_figure(plane, found, goal)
        atomic(
            config.out / "heatmap.png", lambda path: figure.savefig(path, dpi=120, format="png")
        )
        write_arrays(config.out / "heatmap.npz", values=found.values, counts=found.counts)
        facts = {"goal": goal, "distance": peak.distance, "at_goal": peak.at_goal}
        write_json(config.out / "heatmap.json", {"peak": peak.at.tolist()} | facts)
        print(f"{peak}\nheat map: {config.out / 'heatmap.png'}")
