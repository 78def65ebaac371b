"""`reward-jax heatmap`: where a reward is high, drawn in its maze."""

import dataclasses
import pathlib

import jax
import numpy as np

from common_jax.cli.options import MeshOptions, check_seed
from common_jax.errors import InputError
from common_jax.io.files import write_json
from common_jax.mesh import mesh_for
from common_jax.run import note_run
from reward_jax.commands.steer import goal_of, positions
from reward_jax.commands.train import window_source
from reward_jax.data.files import read_episodes
from reward_jax.data.hdf5 import EpisodeEnds
from reward_jax.data.trajectory.checkpoint import load_guide
from reward_jax.tasks.maze.heatmap import draw_map, heat_map, score_windows
from reward_jax.tasks.maze.mazes import draw_maze

__all__ = ["HeatmapConfig", "run_heatmap"]


@dataclasses.dataclass
class HeatmapConfig:
    """Draw the heat map of a reward over the positions that the base visits.

    Args:
        reward: a reward or a discriminator, a file or a run.
        data: the base's episodes.
        ends: where episodes of an HDF5 file end, as for `train`.
        out: folder of heatmap.png, heatmap.json (peak, goal, distance) and heatmap.npz.
        windows: trajectories that are scored.
        bins: to the side of a cell.
        t: diffusion step at which they are scored.
        goal: [x, y] in metres that the peak is measured against; by default the expert's.
        seed: of the choice of windows.
        mesh: devices; windows are cut over data and fsdp.
    """

    reward: str
    data: str
    out: pathlib.Path
    ends: EpisodeEnds = "auto"
    windows: int = 10000
    bins: int = 10
    t: int = 0
    goal: tuple[float, float] | None = None
    seed: int = 0
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


def run_heatmap(config: HeatmapConfig) -> pathlib.Path:
    """Score, draw, print the peak against the goal; returns the folder."""
    from matplotlib.figure import Figure

    mesh = mesh_for(dataclasses.asdict(config.mesh))
    guide = load_guide(config.reward)
    layout, goal = goal_of(guide.space, config.goal)
    check_seed(config.seed)
    if config.windows < 1 or config.bins < 1:
        raise InputError("windows and bins must be 1 or more")
    if not 0 <= config.t < guide.schedule.steps:
        raise InputError(f"t is {config.t}: give 0 to {guide.schedule.steps - 1}")
    source = window_source(read_episodes(config.data, ends=config.ends), guide.space)
    note_run(config.out, dataclasses.asdict(config))
    rows = np.asarray(source.sample(jax.random.key(config.seed), config.windows))
    scores = score_windows(guide.guide, rows, t=config.t, mesh=mesh)
    found = heat_map(
        positions(rows, guide.space), scores, layout.extent, bins=config.bins, cell=layout.size
    )
    away = float(np.linalg.norm(found.peak - goal))
    in_cell = bool((layout.cell_of(found.peak) == layout.cell_of(goal)).all())
    figure = Figure(figsize=(5.4, 4.8), layout="constrained")
    axis = figure.subplots()
    draw_maze(axis, layout)
    figure.colorbar(draw_map(axis, found, goal=goal), label="reward, scaled to 0 .. 1")
    axis.legend(loc="upper right", fontsize=8)
    figure.savefig(config.out / "heatmap.png", dpi=120)
    np.savez_compressed(config.out / "heatmap.npz", values=found.values, counts=found.counts)
    facts = {"peak": found.peak.tolist(), "goal": goal.tolist(), "metres": away}
    write_json(config.out / "heatmap.json", facts | {"in_goal_cell": in_cell})
    print(
        f"peak at ({found.peak[0]:.2f}, {found.peak[1]:.2f}), goal at ({goal[0]:.2f}, "
        f"{goal[1]:.2f}): {away:.2f} m apart, {'the same cell' if in_cell else 'another cell'}"
    )
    print(f"heat map: {config.out / 'heatmap.png'}")
    return config.out
