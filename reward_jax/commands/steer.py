"""`reward-jax steer` and `sweep`: plans of a base, steered by a reward, and what comes of them.

Legend: B plans, H horizon, D transition width, S scales.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from common_jax.cli.options import MeshOptions
from common_jax.cli.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, check_ranges
from common_jax.errors import InputError
from common_jax.io.files import write_json
from common_jax.mesh import mesh_for
from common_jax.run import note_run
from reward_jax.data.trajectory.checkpoint import load_guide, load_model
from reward_jax.data.trajectory.space import TrajectoryGuide, TrajectoryModel, check_steers
from reward_jax.planning.plan import given, plan_sweep, planner
from reward_jax.reward import guide as guided
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.gradients import Guide
from reward_jax.reward.guide import Step
from reward_jax.tasks.base import Planner, Task
from reward_jax.tasks.find import task_of

__all__ = ["GuidanceOptions", "SteerConfig", "SweepConfig", "run_steer", "run_sweep"]

_SHOWN = 64  # plans of a figure


@dataclasses.dataclass(frozen=True)
class GuidanceOptions:
    """How plans climb a reward, apart from how far.

    Args:
        n_guide_steps: times that a plan climbs before each step.
        step: unit of the scale: posterior_mean, variance, score, or learned (the network's own).
        scale_by_variance: times the posterior variance, too.
        output: of a discriminator: logit, or sigmoid.
        temperature: of the sampling noise.
    """

    n_guide_steps: PositiveInt = 1
    step: Step = "posterior_mean"
    scale_by_variance: bool = False
    output: Literal["logit", "sigmoid"] = "logit"
    temperature: NonNegativeFloat = 1.0


@dataclasses.dataclass(kw_only=True)
class _Steered:
    """Options that both commands have.

    Args:
        base: the denoiser that is steered, a file or a run.
        reward: a reward or a discriminator, a file or a run.
        out: folder of what is found.
        guidance: how the reward is climbed.
        plans: how many, from starts that the task draws.
        goal: what outcomes are measured against, such as [x, y]; by default the expert's goal.
        seed: of starts and noise.
        mesh: devices; plans are cut over data and fsdp.
    """

    base: str
    reward: str
    out: pathlib.Path
    guidance: GuidanceOptions = dataclasses.field(default_factory=GuidanceOptions)
    plans: PositiveInt = 256
    goal: str | tuple[float, ...] | None = None
    seed: Seed = 0
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


@dataclasses.dataclass(kw_only=True)
class SteerConfig(_Steered):
    """Plan with a base model, steered by a reward; writes plans.npz, steer.json and steer.png.

    Args:
        scale: guidance scale; 1 moves as far as the expert would (step posterior_mean).
        t_stopgrad: no guidance at diffusion steps below it.
    """

    scale: float = 2.0
    t_stopgrad: NonNegativeInt = 0


@dataclasses.dataclass(kw_only=True)
class SweepConfig(_Steered):
    """Every guidance scale with every t_stopgrad; writes sweep.json.

    Args:
        scales: guidance scales.
        t_stopgrads: diffusion steps below which there is no guidance.
        execute: in the world, too, and not in plans alone.
    """

    plans: PositiveInt = 64
    scales: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    t_stopgrads: tuple[NonNegativeInt, ...] = (0, 2, 5, 10)
    execute: bool = False


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """What both commands work with. climbed: what steers; options: but for how far."""

    base: TrajectoryModel
    guide: TrajectoryGuide
    task: Task
    goal: Any
    climbed: Guide
    options: guided.GuidanceOptions
    mesh: Mesh | None

    def planner(self, **options: Any) -> Planner:
        """Of the base, steered by so much; unsteered without options."""
        now = dataclasses.replace(self.options, **options)
        guide = self.climbed if options else None
        return planner(self.base, guide=guide, options=now, mesh=self.mesh)


def _load(config: _Steered) -> _Loaded:
    g = config.guidance
    check_ranges(config)
    base, guide = load_model(config.base), load_guide(config.reward)
    check_steers("base and reward", base, guide)
    climbed: Any = guide.guide
    if isinstance(climbed, DiscriminatorGuide):
        climbed = climbed.replace(output=g.output)  # pyright: ignore[reportAttributeAccessIssue]
    about = guide.space.about
    task = task_of(about)
    goal = task.goal(about.get("goal") if config.goal is None else config.goal)
    named = ("n_guide_steps", "step", "scale_by_variance", "temperature")
    options = guided.GuidanceOptions(**{name: getattr(g, name) for name in named})
    mesh = mesh_for(dataclasses.asdict(config.mesh))
    return _Loaded(base, guide, task, goal, climbed, options, mesh)


def run_steer(config: SteerConfig) -> pathlib.Path:
    """Plan, execute, measure, draw; returns the folder."""
    from matplotlib.figure import Figure

    loaded = _load(config)
    task, goal = loaded.task, loaded.goal
    note_run(config.out, dataclasses.asdict(config))
    starts, key = task.starts(config.plans, config.seed), jax.random.key(config.seed)
    planners = {
        "unsteered": loaded.planner(),
        "steered": loaded.planner(scale=config.scale, t_stopgrad=config.t_stopgrad),
    }
    outcomes = {n: task.execute(p, starts, key=key, goal=goal) for n, p in planners.items()}
    means = {name: outcome.means() for name, outcome in outcomes.items()}
    for name, found in means.items():
        print(f"{name}: {task.summarise(found)}")
    shown = {name: outcome.shown for name, outcome in outcomes.items()}
    np.savez_compressed(
        config.out / "plans.npz",
        plans=shown["steered"],
        unsteered=shown["unsteered"],
        starts=starts,
    )
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, 2), shown.items(), strict=True):
        task.draw(axis, rows[:_SHOWN], goal=goal)
        axis.set_title(f"{name}: {task.summarise(means[name])}")
    figure.savefig(config.out / "steer.png", dpi=120)
    write_json(config.out / "steer.json", means | {"goal": goal, "scale": config.scale})
    print(f"plans: {config.out}")
    return config.out


def run_sweep(config: SweepConfig) -> pathlib.Path:
    """Sweep, measure, print a table; returns the folder."""
    if not config.scales or not config.t_stopgrads:
        raise InputError("scales and t_stopgrads need a number each, or more")
    loaded = _load(config)
    task = loaded.task
    measure = task.shown_measure(executed=config.execute)
    if measure is None:
        raise InputError(f"plans of {task.name} alone tell nothing: give --execute")
    note_run(config.out, dataclasses.asdict(config))
    starts, key = task.starts(config.plans, config.seed), jax.random.key(config.seed)
    rows = []
    print(measure.title)
    print("scale \\ t_stopgrad" + "".join(f"{stop:8d}" for stop in config.t_stopgrads))
    for scale, planners in _planners(config, loaded, starts, key):
        line = []
        for stop, one in zip(config.t_stopgrads, planners, strict=True):
            options: dict[str, Any] = dict(key=key, goal=loaded.goal, simulate=config.execute)
            found = task.execute(one, starts, **options).means()
            rows.append({"scale": scale, "t_stopgrad": stop} | found)
            line.append(found[measure.name])
        print(f"{scale:18g}" + "".join(f"{value:8.{measure.digits}f}" for value in line))
    write_json(config.out / "sweep.json", rows)
    print(f"sweep: {config.out / 'sweep.json'}")
    return config.out


def _planners(
    config: SweepConfig, loaded: _Loaded, starts: np.ndarray, key: jax.Array
) -> Iterator[tuple[float, list[Planner]]]:
    """Each scale, with a planner for each t_stopgrad.

    Where the task plans once, all plans are made in one compiled call, and given out.
    """
    base = loaded.base
    if loaded.task.replans:
        for scale in config.scales:
            stops = config.t_stopgrads
            yield scale, [loaded.planner(scale=scale, t_stopgrad=s) for s in stops]
        return
    swept = plan_sweep(
        base,
        starts,
        key=key,
        guide=loaded.climbed,
        scales=config.scales,
        t_stopgrads=config.t_stopgrads,
        options=loaded.options,
        mesh=loaded.mesh,
    )
    for scale, row in zip(config.scales, swept, strict=True):
        plans = [given(base.space.plans(x)) for x in row]
        yield scale, plans
