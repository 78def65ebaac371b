"""`reward-jax report`: one HTML page of a base, an expert and the reward between them."""

import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from common_jax.cli.ranges import PositiveInt, Seed, check_ranges
from common_jax.errors import InputError
from common_jax.io.files import atomic
from common_jax.report import page
from common_jax.report.figures import PALETTE, draw
from common_jax.run import note_run, read_metrics
from reward_jax.commands.extract import read_diagnostics
from reward_jax.commands.steering import STEERED, SteeringConfig
from reward_jax.data.trajectory.checkpoint import load_guide, load_model
from reward_jax.data.trajectory.space import (
    TrajectoryGuide,
    TrajectoryModel,
    check_same_space,
    check_steers,
)
from reward_jax.data.trajectory.windows import CutOptions
from reward_jax.planning.fit import window_source
from reward_jax.planning.plan import plan, planner, score_windows
from reward_jax.reward.extract import RelativeReward
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.tasks.base import Outcome, Task
from reward_jax.tasks.find import read, task_of
from reward_jax.tasks.plane import HeatMap, MapOptions, Peak, draw_map

__all__ = ["Config", "run"]

_SHOWN = 48  # trajectories of a figure
_STEP = GuidanceOptions.step
_PANELS = 6  # of the denoising of one trajectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MapOptions):
    """Draw a base, an expert and their reward, steer the base, and write a page.

    Args:
        base: the base's denoiser, a file or a run.
        expert: the expert's, likewise.
        reward: the run of `reward-jax extract`.
        data: the base's episodes.
        cut: how the file is divided into episodes, and episodes into windows.
        out: folder of report.html.
        guidance: how plans are drawn and steered.
        plans: steered plans.
        seed: of starts, noise and choices.
    """

    base: str
    expert: str
    reward: str
    data: str
    out: pathlib.Path
    cut: CutOptions = dataclasses.field(default_factory=CutOptions)
    guidance: GuidanceOptions = STEERED
    plans: PositiveInt = SteeringConfig.plans
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class _Maps:
    """Of a world that has a plane.

    chain: one plan's steered denoising, [S + 1, H, 2] for S steps of the sampler. left: diffusion
    steps that are left at each, [S + 1].
    """

    map: HeatMap
    peak: Peak
    seed_peaks: np.ndarray
    chain: np.ndarray
    left: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the page shows. outcomes: by what was steered; maps: None without a plane."""

    task: Task
    goal: Any
    recorded: np.ndarray
    outcomes: dict[str, Outcome]
    maps: _Maps | None
    metrics: list[dict[str, float]]
    diagnostics: dict[str, Any]


_PLANNERS = ("base, unsteered", "base, steered by the reward", "expert")


def run(config: Config) -> pathlib.Path:
    """Measure, draw, write; prints the peak against the goal; returns the path of the page."""
    check_ranges(config)
    config.guidance.made_sampler()
    base, expert = load_model(config.base), load_model(config.expert)
    guide = load_guide(config.reward)
    if not isinstance(guide.guide, RelativeReward):
        raise InputError(f"{config.reward}: holds a discriminator; a reward is wanted")
    check_steers("base and reward", base, guide)
    check_same_space("base and expert", base.space, expert.space)
    about = guide.space.about
    task = task_of(about)
    goal = task.goal(about.get("goal"))  # before anything is written
    noted = read_metrics(config.reward), read_diagnostics(config.reward)
    source = window_source(read(config.data, ends=config.cut.ends), base.space, config.cut.padding)
    note_run(config.out, dataclasses.asdict(config))
    rows = np.asarray(source.sample(jax.random.key(config.seed), config.windows))
    starts, key = task.starts(config.plans, config.seed), jax.random.key(config.seed + 1)
    how: dict[str, Any] = dict(options=config.guidance)
    planners = (
        planner(base, **how),
        planner(base, guide=guide.guide, **how),
        planner(expert, **how),
    )
    outcomes = {
        name: task.execute(one, starts, key=key, goal=goal)
        for name, one in zip(_PLANNERS, planners, strict=True)
    }
    maps = _maps(config, task, goal, base, guide, rows, starts)
    recorded = task.recorded(base.space.plans(rows[:_SHOWN]).observations)
    found = _Found(task, goal, recorded, outcomes, maps, *noted)
    path = config.out / "report.html"
    with atomic(path) as temporary:
        temporary.write_text(_render(config, base, guide, found), "utf-8")
    if maps:
        print(maps.peak)
    for name, outcome in outcomes.items():
        print(f"{name}: {task.summarise(outcome.means())}")
    print(f"report: {path.resolve()}")
    return path


def _maps(
    config: Config,
    task: Task,
    goal: Any,
    base: TrajectoryModel,
    guide: TrajectoryGuide,
    rows: np.ndarray,
    starts: np.ndarray,
) -> _Maps | None:
    """Maps of the reward and of each seed; the denoising of the plan that starts farthest off."""
    reward, plane = guide.guide, task.plane
    assert isinstance(reward, RelativeReward)
    if plane is None:
        return None
    visited = base.space.plans(rows).observations

    def map_of(reward: RelativeReward) -> HeatMap:
        return plane.heat_map(visited, score_windows(reward, rows), bins=config.bins)

    away = np.linalg.norm(plane.positions(starts) - np.asarray(goal), axis=1)
    farthest = np.argsort(-away)[:1]
    chain = plan(
        base,
        starts[farthest],
        key=jax.random.key(config.seed + 1),
        chain=True,
        guide=reward,
        options=config.guidance,
    )[:, 0]
    schedule = base.denoiser.schedule
    found = map_of(reward)
    seeds = [reward.seed(i) for i in range(reward.seeds)] if reward.seeds else [reward]
    return _Maps(
        map=found,
        peak=Peak.of(found, plane, goal),
        seed_peaks=np.stack([map_of(seed).peak for seed in seeds]),
        chain=plane.positions(base.space.plans(chain).observations),
        left=np.append(np.asarray(config.guidance.made_sampler().timesteps(schedule)) + 1, 0),
    )


def _render(config: Config, base: TrajectoryModel, guide: TrajectoryGuide, found: _Found) -> str:
    task = found.task
    means = {name: outcome.means() for name, outcome in found.outcomes.items()}
    unsteered, steered, _ = means.values()
    result = f"Steered by it: {task.summarise(steered)} (unsteered: {task.summarise(unsteered)})."
    if found.maps:
        peak = found.maps.peak
        where = f"in the goal's own {peak.place}" if peak.at_goal else f"in another {peak.place}"
        result = f"It peaks {peak.distance:.2f} {peak.unit} from the goal, {where}. {result}"
    return page.render(
        pathlib.Path(__file__).with_name("report.html"),
        title=f"What does the expert want? A reward from two diffusion models, {task.name}",
        summary=[
            f"{task.captions.story} Nobody tells what the goal is: the reward below was learned "
            "from the difference of the two models alone.",
            result,
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
        facts=_facts(config, base, guide, task),
        captions=task.captions,
        measures=task.measures,
        means=means,
        figures=_figures(found),
        panels=_panels(found),
    )


def _facts(
    config: Config, base: TrajectoryModel, guide: TrajectoryGuide, task: Task
) -> dict[str, str]:
    d, reward = base.denoiser, guide.guide
    assert isinstance(reward, RelativeReward)
    count = sum(x.size for x in jax.tree.leaves(reward.params)) // (reward.seeds or 1)
    names = ("jax", "flax", *task.packages)
    facts = {
        "denoisers": f"{sum(x.size for x in jax.tree.leaves(d.params)):,} parameters each, "
        f"{d.prediction} prediction, {d.schedule.steps} diffusion steps, {d.schedule.name} "
        "schedule",
        "trajectories": f"{guide.space.horizon} rows, one every {base.space.stride} environment "
        "steps",
        "reward": f"{count:,} parameters, {reward.seeds or 1} seeds, matched to differences of "
        f"{reward.target}",
        "guidance": _guidance(config.guidance),
    }
    if task.plane:
        facts["map"] = (
            f"{config.windows:,} trajectories of the base, {config.bins} bins to "
            f"{task.plane.cell:g} {task.plane.unit}"
        )
    return facts | {
        "device": str(jax.devices()[0].device_kind),
        "versions": ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names),
    }


def _guidance(options: GuidanceOptions) -> str:
    """What is not its default, and the scale."""
    moves = " (1 moves as far as the expert's mean would)" if options.step == _STEP else ""
    changed = [
        f"{f.name} {value}"
        for f in dataclasses.fields(options)
        if f.name != "scale" and (value := getattr(options, f.name)) != f.default
    ]
    return ", ".join([f"scale {options.scale:g}{moves}", *changed])


def _figures(found: _Found) -> dict[str, tuple[str, str]]:
    """Name -> (data URI, what it shows in words)."""
    task, maps = found.task, found.maps

    def outcomes(shown: np.ndarray, color: str) -> Callable[[Any], None]:
        return lambda axis: task.draw(axis, shown[:_SHOWN], goal=found.goal, color=color)

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

    unsteered, steered, expert = (outcome.shown for outcome in found.outcomes.values())
    size: dict[str, Any] = dict(width=4.8, height=4.4)
    figures = {
        "base": (draw(outcomes(found.recorded, PALETTE[1]), **size), task.captions.alt_base),
        "expert": (draw(outcomes(expert, PALETTE[3]), **size), task.captions.alt_expert),
        "unsteered": (draw(outcomes(unsteered, PALETTE[1]), **size), "unsteered plans"),
        "steered": (draw(outcomes(steered, PALETTE[0]), **size), "steered plans"),
    }
    if maps:
        away = f"the peak lies {maps.peak.distance:.2f} {maps.peak.unit} from the goal"
        heat = draw(lambda axis: _heat(axis, found, maps), width=5.6, height=4.6)
        figures["heat"] = heat, f"heat map of the reward; {away}"
    if found.metrics:
        figures["loss"] = draw(loss), "loss of the reward against training steps"
    if found.diagnostics:
        figures["explained"] = draw(explained), "diagnostics at each diffusion step"
    return figures


def _heat(axis: Any, found: _Found, maps: _Maps) -> None:
    assert found.task.plane
    image = draw_map(axis, maps.map, goal=found.goal)
    found.task.plane.draw(axis)
    axis.plot(*maps.seed_peaks.T, "+", color="white", ms=9, mew=1.6, label="each seed's")
    axis.figure.colorbar(image, ax=axis, shrink=0.8)
    axis.legend(loc="lower left", fontsize=8, facecolor="#333b42", labelcolor="white")


def _panels(found: _Found) -> list[tuple[str, str]]:
    """The steered denoising of one trajectory: (caption, data URI)."""
    plane, maps = found.task.plane, found.maps
    if plane is None or maps is None:
        return []
    last = len(maps.chain) - 1
    panels = []
    for index in np.linspace(0, last, _PANELS).round().astype(int):
        xy = maps.chain[index]

        def paint(axis: Any, xy: np.ndarray = xy) -> None:
            plane.draw(axis)
            axis.plot(*xy.T, "-", color=PALETTE[0], lw=0.8, alpha=0.5)
            axis.scatter(*xy.T, c=np.arange(len(xy)), cmap="viridis", s=14, zorder=3)
            axis.plot(*found.goal, "*", color="#d55e00", mec="white", ms=14)
            axis.set(xlabel="", ylabel="", xticks=[], yticks=[])

        panels.append((f"t = {maps.left[index]}", draw(paint, width=2.6, height=2.6)))
    return panels
