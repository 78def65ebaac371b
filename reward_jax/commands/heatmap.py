"""`reward-jax heatmap`: where a reward is high, drawn in the plane of its task."""

import dataclasses
import pathlib

import jax
import numpy as np

from common_jax.cli.options import MeshOptions
from common_jax.cli.ranges import NonNegativeInt, Seed, check_ranges
from common_jax.errors import InputError
from common_jax.io.files import write_json
from common_jax.mesh import mesh_for
from common_jax.run import note_run
from reward_jax.data.trajectory.checkpoint import load_guide
from reward_jax.data.trajectory.windows import CutOptions
from reward_jax.planning.fit import window_source
from reward_jax.planning.plan import score_windows
from reward_jax.tasks.find import read, task_of
from reward_jax.tasks.plane import MapOptions, Peak, draw_map

__all__ = ["Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MapOptions):
    """Draw the heat map of a reward over the positions that the base visits.

    Args:
        reward: a reward or a discriminator, a file or a run.
        data: the base's episodes.
        cut: how the file is divided into episodes, and episodes into windows.
        out: folder of heatmap.png, heatmap.json (peak, goal, distance) and heatmap.npz.
        t: diffusion step at which they are scored.
        goal: what the peak is measured against, such as [x, y]; by default the expert's goal.
        seed: of the choice of windows.
        mesh: devices; windows are sharded over data and fsdp.
    """

    reward: str
    data: str
    out: pathlib.Path
    cut: CutOptions = dataclasses.field(default_factory=CutOptions)
    t: NonNegativeInt = 0
    goal: str | tuple[float, ...] | None = None
    seed: Seed = 0
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


def run(config: Config) -> pathlib.Path:
    """Score, draw, print the peak against the goal; returns the folder."""
    from matplotlib.figure import Figure

    check_ranges(config)
    mesh = mesh_for(dataclasses.asdict(config.mesh))
    guide = load_guide(config.reward)
    about = guide.space.about
    task = task_of(about)
    goal = task.goal(about.get("goal") if config.goal is None else config.goal)
    if (plane := task.plane) is None:
        raise InputError(f"{task.name} has no plane in which a map could be drawn")
    if config.t >= guide.schedule.steps:
        raise InputError(f"t is {config.t}: give 0 to {guide.schedule.steps - 1}")
    source = window_source(
        read(config.data, ends=config.cut.ends), guide.space, config.cut.padding
    )
    note_run(config.out, dataclasses.asdict(config))
    rows = np.asarray(source.sample(jax.random.key(config.seed), config.windows))
    scores = score_windows(guide.guide, rows, t=config.t, mesh=mesh)
    found = plane.heat_map(guide.space.plans(rows).observations, scores, bins=config.bins)
    peak = Peak.of(found, plane, goal)
    figure = Figure(figsize=(5.4, 4.8), layout="constrained")
    axis = figure.subplots()
    plane.draw(axis)
    figure.colorbar(draw_map(axis, found, goal=goal), label="reward, scaled to 0 .. 1")
    axis.legend(loc="upper right", fontsize=8)
    figure.savefig(config.out / "heatmap.png", dpi=120)
    np.savez_compressed(config.out / "heatmap.npz", values=found.values, counts=found.counts)
    facts = {
        "peak": peak.at.tolist(),
        "goal": goal,
        "distance": peak.distance,
        "at_goal": peak.at_goal,
    }
    write_json(config.out / "heatmap.json", facts)
    print(peak)
    print(f"heat map: {config.out / 'heatmap.png'}")
    return config.out
