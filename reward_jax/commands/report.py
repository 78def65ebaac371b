"""`reward-jax report`: one HTML page of a base, an expert and the reward between them."""

import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from common_jax.cli.options import check_seed
from common_jax.errors import InputError
from common_jax.io.files import atomic
from common_jax.report import page
from common_jax.report.figures import PALETTE, draw
from common_jax.run import note_run, read_metrics
from reward_jax.commands.extract import read_diagnostics
from reward_jax.commands.steer import Ends, draw_plans, ends, goal_of, plan, positions, starts_in
from reward_jax.commands.train import window_source
from reward_jax.data.files import read_episodes
from reward_jax.data.hdf5 import EpisodeEnds
from reward_jax.data.trajectory.checkpoint import (
    TrajectoryGuide,
    TrajectoryModel,
    check_same_space,
    check_same_terms,
    load_guide,
    load_model,
)
from reward_jax.diffusion.sources import Strided
from reward_jax.reward.extract import RelativeReward
from reward_jax.tasks.maze.heatmap import HeatMap, draw_map, heat_map, score_windows
from reward_jax.tasks.maze.mazes import Maze, draw_maze

__all__ = ["ReportConfig", "run_report"]

_SHOWN = 48  # trajectories of a figure
_PANELS = 6  # of the denoising of one trajectory


@dataclasses.dataclass
class ReportConfig:
    """Draw a base, an expert and their reward, steer the base, and write a page.

    Args:
        base: the base's denoiser, a file or a run.
        expert: the expert's, likewise.
        reward: the run of `reward-jax extract`.
        data: the base's episodes.
        ends: where episodes of an HDF5 file end, as for `train`.
        out: folder of report.html.
        scale: guidance scale.
        plans: steered plans.
        windows: trajectories that make the heat map.
        bins: of the heat map, to the side of a cell.
        seed: of starts, noise and choices.
    """

    base: str
    expert: str
    reward: str
    data: str
    out: pathlib.Path
    ends: EpisodeEnds = "auto"
    scale: float = 2.0
    plans: int = 256
    windows: int = 10000
    bins: int = 10
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the page shows; positions in metres."""

    maze: Maze
    goal: np.ndarray
    base_walks: np.ndarray
    expert_plans: np.ndarray
    chain: np.ndarray
    map: HeatMap
    seed_peaks: np.ndarray
    plans: dict[str, np.ndarray]
    ends: dict[str, Ends]
    metrics: list[dict[str, float]]
    diagnostics: dict[str, Any]

    @property
    def away(self) -> float:
        return float(np.linalg.norm(self.map.peak - self.goal))

    @property
    def in_cell(self) -> bool:
        return bool((self.maze.cell_of(self.map.peak) == self.maze.cell_of(self.goal)).all())


def run_report(config: ReportConfig) -> pathlib.Path:
    """Measure, draw, write; prints the peak against the goal; returns the path of the page."""
    if config.plans < 1 or config.windows < 1 or config.bins < 1:
        raise InputError("plans, windows and bins must be 1 or more")
    check_seed(config.seed)
    base, expert = load_model(config.base), load_model(config.expert)
    guide = load_guide(config.reward)
    if not isinstance(guide.guide, RelativeReward):
        raise InputError(f"{config.reward}: holds a discriminator; a reward is wanted")
    check_same_terms("base and reward", base, guide)
    check_same_space("base and expert", base.space, expert.space)
    goal_of(guide.space)  # before anything is written
    kept = read_diagnostics(config.reward), read_metrics(config.reward)
    source = window_source(read_episodes(config.data, ends=config.ends), base.space)
    note_run(config.out, dataclasses.asdict(config))
    found = _measure(config, base, expert, guide, source, *kept)
    path = config.out / "report.html"
    with atomic(path) as temporary:
        temporary.write_text(_render(config, base, guide, found), "utf-8")
    peak, goal = found.map.peak, found.goal
    print(
        f"peak at ({peak[0]:.2f}, {peak[1]:.2f}), goal at ({goal[0]:.2f}, {goal[1]:.2f}): "
        f"{found.away:.2f} m apart, {'the same cell' if found.in_cell else 'another cell'}"
    )
    for name, e in found.ends.items():
        print(f"{name}: {e.planned:.2f} of plans end at the goal, {e.executed:.2f} when executed")
    print(f"report: {path.resolve()}")
    return path


def _measure(
    config: ReportConfig,
    base: TrajectoryModel,
    expert: TrajectoryModel,
    guide: TrajectoryGuide,
    source: Strided,
    diagnostics: dict[str, Any],
    metrics: list[dict[str, float]],
) -> _Found:
    layout, goal = goal_of(guide.space)
    space, reward = base.space, guide.guide
    assert isinstance(reward, RelativeReward)
    rows = np.asarray(source.sample(jax.random.key(config.seed), config.windows))
    places = positions(rows, space)

    def map_of(reward: RelativeReward) -> HeatMap:
        scores = score_windows(reward, rows)
        return heat_map(places, scores, layout.extent, bins=config.bins, cell=layout.size)

    starts, key = starts_in(layout, config.plans, config.seed), jax.random.key(config.seed + 1)
    steering: dict[str, Any] = dict(reward=reward, scale=config.scale)
    plans = {
        "base, unsteered": positions(plan(base, starts, key=key), space),
        "base, steered by the reward": positions(plan(base, starts, key=key, **steering), space),
        "expert": positions(plan(expert, starts, key=key), expert.space),
    }
    farthest = np.argsort(-np.linalg.norm(starts[:, :2] - goal, axis=1))[:1]
    chain = plan(base, starts[farthest], key=key, chain=True, **steering)[:, 0]
    seeds = [reward.seed(i) for i in range(reward.seeds)] if reward.seeds else [reward]
    return _Found(
        maze=layout,
        goal=goal,
        base_walks=places[:_SHOWN],
        expert_plans=plans["expert"],
        chain=positions(chain, space),
        map=map_of(reward),
        seed_peaks=np.stack([map_of(seed).peak for seed in seeds]),
        plans=plans,
        ends={n: ends(layout, goal, xy, starts, space.stride) for n, xy in plans.items()},
        metrics=metrics,
        diagnostics=diagnostics,
    )


def _render(
    config: ReportConfig, base: TrajectoryModel, guide: TrajectoryGuide, found: _Found
) -> str:
    reward = guide.guide
    assert isinstance(reward, RelativeReward)
    unsteered, steered, _ = found.ends.values()
    where = "in the goal's own cell" if found.in_cell else "in another cell than the goal"
    d = base.denoiser
    return page.render(
        pathlib.Path(__file__).with_name("report.html"),
        title=f"What does the expert want? A reward from two diffusion models, {found.maze.name}",
        summary=[
            "Two diffusion models plan walks through a maze: the base to anywhere, the expert to "
            "one goal. Nobody tells what the goal is: the reward below was learned from the "
            "difference of the two models alone.",
            f"It peaks {found.away:.2f} m from the goal, {where}. Steered by it, "
            f"{100 * steered.planned:.0f}% of the base's plans end at the goal "
            f"({100 * unsteered.planned:.0f}% unsteered).",
        ],
        method=[
            "The difference of the scores of two diffusion models over the same trajectories is "
            "the gradient of a relative reward, expert against base (Nuti, Franzmeyer and "
            "Henriques, NeurIPS 2023, arXiv 2306.01804). A network's gradient is matched to that "
            "difference on noised trajectories; no environment, rewards or labels are used.",
            "The map averages the reward of clean trajectories over the places that they visit "
            "(winsorised at 0.5% a tail, scaled to 0 .. 1). To steer, each denoising step of the "
            "base first climbs the reward.",
        ],
        facts=_facts(config, d, guide, reward, base.space.stride),
        found=found,
        figures=_figures(found),
        panels=_panels(found),
        near="0.5 m",
    )


def _facts(config: ReportConfig, d: Any, guide: Any, reward: Any, stride: int) -> dict[str, str]:
    count = sum(x.size for x in jax.tree.leaves(reward.params)) // (reward.seeds or 1)
    names = ("jax", "flax", "gymnasium-robotics", "mujoco")
    return {
        "denoisers": f"{sum(x.size for x in jax.tree.leaves(d.params)):,} parameters each, "
        f"{d.prediction} prediction, {d.schedule.steps} diffusion steps, {d.schedule.name} "
        "schedule",
        "trajectories": f"{guide.space.horizon} rows, one every {stride} environment steps",
        "reward": f"{count:,} parameters, {reward.seeds or 1} seeds, matched to differences of "
        f"{reward.target}",
        "guidance scale": f"{config.scale:g} (1 moves as far as the expert's mean would)",
        "map": f"{config.windows:,} trajectories of the base, {config.bins} bins to a metre",
        "device": str(jax.devices()[0].device_kind),
        "versions": ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names),
    }


def _figures(found: _Found) -> dict[str, tuple[str, str]]:
    """Name -> (data URI, what it shows in words)."""
    layout, goal = found.maze, found.goal

    def trajectories(xy: np.ndarray, color: str) -> Callable[[Any], None]:
        return lambda axis: draw_plans(axis, layout, xy[:_SHOWN], goal, color=color)

    def heat(axis: Any) -> None:
        image = draw_map(axis, found.map, goal=goal)
        draw_maze(axis, layout)
        axis.plot(*found.seed_peaks.T, "+", color="white", ms=9, mew=1.6, label="each seed's")
        axis.figure.colorbar(image, ax=axis, shrink=0.8)
        axis.legend(loc="lower left", fontsize=8, facecolor="#333b42", labelcolor="white")

    def loss(axis: Any) -> None:
        rows = [m for m in found.metrics if "loss" in m]
        axis.plot([m["step"] for m in rows], [m["loss"] for m in rows], color=PALETTE[0])
        axis.set(xlabel="step", ylabel="loss", yscale="log")

    def explained(axis: Any) -> None:
        names = {
            "explained": "explained by the reward",
            "antisymmetric": "no gradient field (share of the Jacobian)",
            "seed_agreement": "agreement of seeds (cosine)",
        }
        for color, (name, label) in zip(PALETTE, names.items(), strict=False):
            if name in found.diagnostics:
                axis.plot(found.diagnostics[name], color=color, label=label)
        axis.set(xlabel="diffusion step t", ylim=(-0.05, 1.05))
        axis.legend(fontsize=8)

    away = f"the peak lies {found.away:.2f} m from the goal"
    walks = found.base_walks, found.expert_plans
    plans = list(found.plans.values())
    size: dict[str, Any] = dict(width=4.8, height=4.4)
    figures = {
        "base": (draw(trajectories(walks[0], PALETTE[1]), **size), "walks that the base learned"),
        "expert": (draw(trajectories(walks[1], PALETTE[3]), **size), "plans of the expert"),
        "heat": (draw(heat, width=5.6, height=4.6), f"heat map of the reward; {away}"),
        "unsteered": (draw(trajectories(plans[0], PALETTE[1]), **size), "unsteered plans"),
        "steered": (draw(trajectories(plans[1], PALETTE[0]), **size), "steered plans"),
    }
    if found.metrics:
        figures["loss"] = draw(loss), "loss of the reward against training steps"
    if found.diagnostics:
        figures["explained"] = draw(explained), "diagnostics at each diffusion step"
    return figures


def _panels(found: _Found) -> list[tuple[str, str]]:
    """The steered denoising of one trajectory: (caption, data URI)."""
    last = len(found.chain) - 1
    panels = []
    for index in np.linspace(0, last, _PANELS).round().astype(int):
        xy = found.chain[index]

        def paint(axis: Any, xy: np.ndarray = xy) -> None:
            draw_maze(axis, found.maze)
            axis.plot(*xy.T, "-", color=PALETTE[0], lw=0.8, alpha=0.5)
            axis.scatter(*xy.T, c=np.arange(len(xy)), cmap="viridis", s=14, zorder=3)
            axis.plot(*found.goal, "*", color="#d55e00", mec="white", ms=14)
            axis.set(xlabel="", ylabel="", xticks=[], yticks=[])

        panels.append((f"t = {last - index}", draw(paint, width=2.6, height=2.6)))
    return panels
