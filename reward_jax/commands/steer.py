"""`reward-jax steer` and `sweep`: plans of a base, steered by a reward, and where they end.

Legend: B plans, H horizon, D transition width, A actions, S scales.
"""

import dataclasses
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.cli.options import MeshOptions, check_seed
from common_jax.errors import InputError
from common_jax.io.files import write_json
from common_jax.mesh import mesh_for
from common_jax.run import note_run
from reward_jax.data.trajectory.checkpoint import (
    Space,
    TrajectoryGuide,
    TrajectoryModel,
    check_same_terms,
    load_guide,
    load_model,
)
from reward_jax.diffusion.process import first_state
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.guide import Step, guided_sample, sweep
from reward_jax.tasks.maze.mazes import Maze, check_goal, draw_maze, maze, maze_of, uniform_starts
from reward_jax.tasks.maze.planner import follow

__all__ = [
    "NEAR",
    "Ends",
    "SteerConfig",
    "SweepConfig",
    "draw_plans",
    "ends",
    "goal_of",
    "plan",
    "plan_sweep",
    "positions",
    "run_steer",
    "run_sweep",
    "starts_in",
]

NEAR = 0.5  # metres: a plan that ends nearer than this has ended at the goal (cells are 1 m wide)


@dataclasses.dataclass(frozen=True)
class Ends:
    """Shares of plans that end within 0.5 m of the goal: in the plan, and in the simulator.

    inside: share of planned positions that lie in free cells.
    """

    planned: float
    executed: float | None
    inside: float


def positions(x: Any, space: Space) -> np.ndarray:
    """Trajectories [..., H, D] of a model as positions [..., H, 2] in metres."""
    restored = space.normaliser.restore(np.asarray(x, np.float64))
    return restored[..., space.actions : space.actions + 2]


def plan(
    model: TrajectoryModel, starts: np.ndarray, *, key: jax.Array, **options: Any
) -> jax.Array:
    """Trajectories [B, H, D] from starts [B, O]; options: as of `guided_sample`."""
    shape, pinned = _given(model, starts)
    d = model.denoiser
    return guided_sample(d, d.schedule, shape, key=key, pinned=pinned, **options)


def plan_sweep(
    model: TrajectoryModel, starts: np.ndarray, *, key: jax.Array, **options: Any
) -> jax.Array:
    """Trajectories for every scale and t_stopgrad; options: as of `sweep`."""
    shape, pinned = _given(model, starts)
    d = model.denoiser
    return sweep(d, d.schedule, shape, key=key, pinned=pinned, **options)


def _given(model: TrajectoryModel, starts: np.ndarray) -> tuple[tuple[int, ...], Any]:
    space = model.space
    observed = space.normaliser.part(slice(space.actions, None)).normalise(np.asarray(starts))
    pinned = first_state(jnp.asarray(observed, jnp.float32), *space.shape)
    return (len(starts), *space.shape), pinned


def ends(
    maze: Maze,
    goal: np.ndarray,
    plans: np.ndarray,
    starts: np.ndarray,
    stride: int,
    *,
    execute: bool = True,
) -> Ends:
    """Where plans [B, H, 2] (metres) end; execute: also in the simulator, from starts [B, 4]."""

    def near(last: np.ndarray) -> float:
        return float((np.linalg.norm(last - goal, axis=-1) < NEAR).mean())

    executed = near(follow(maze, plans, starts, stride)[:, -1]) if execute else None
    return Ends(near(plans[:, -1]), executed, float(maze.inside(plans).mean()))


def starts_in(layout: Maze, count: int, seed: int) -> np.ndarray:
    """States at rest, uniform over the free area, [count, 4]."""
    xy = uniform_starts(layout, count, np.random.default_rng(seed))
    return np.concatenate([xy, np.zeros_like(xy)], axis=1)


def goal_of(space: Space, given: tuple[float, float] | None = None) -> tuple[Maze, np.ndarray]:
    """The maze of a space and the goal: the given one, or the expert's own."""
    name = space.about.get("maze") or maze_of(space.about.get("environment"))
    if not name:
        raise InputError("the model's data came from no maze of ours; plans cannot be executed")
    layout = maze(name)
    goal = given if given is not None else space.about.get("goal")
    if goal is None:
        raise InputError("the reward's data had no goal; give one with --goal [x, y]")
    return layout, check_goal(layout, goal)


@dataclasses.dataclass
class SteerConfig:
    """Plan with a base model, steered by a reward.

    Args:
        base: the denoiser that is steered, a file or a run.
        reward: a reward or a discriminator, a file or a run.
        out: folder of plans.npz (plans, starts, unsteered; metres), steer.json and steer.png.
        scale: guidance scale; 1 moves as far as the expert would (step posterior_mean).
        t_stopgrad: no guidance at diffusion steps below it.
        n_guide_steps: times that a plan climbs before each step.
        step: unit of the scale: posterior_mean, variance, score, or learned (the network's own).
        scale_by_variance: times the posterior variance, too.
        output: of a discriminator: logit, or sigmoid.
        temperature: of the sampling noise.
        plans: how many, from starts uniform over the maze.
        goal: [x, y] in metres that ends are measured against; by default the expert's.
        seed: of starts and noise.
        mesh: devices; plans are cut over data and fsdp.
    """

    base: str
    reward: str
    out: pathlib.Path
    scale: float = 2.0
    t_stopgrad: int = 0
    n_guide_steps: int = 1
    step: Step = "posterior_mean"
    scale_by_variance: bool = False
    output: Literal["logit", "sigmoid"] = "logit"
    temperature: float = 1.0
    plans: int = 256
    goal: tuple[float, float] | None = None
    seed: int = 0
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


@dataclasses.dataclass
class SweepConfig:
    """Every guidance scale with every t_stopgrad, in one compiled call.

    Args:
        base: the denoiser that is steered, a file or a run.
        reward: a reward or a discriminator, a file or a run.
        out: folder of sweep.json.
        scales: guidance scales.
        t_stopgrads: diffusion steps below which there is no guidance.
        n_guide_steps: times that a plan climbs before each step.
        step: unit of the scales.
        scale_by_variance: times the posterior variance, too.
        output: of a discriminator: logit, or sigmoid.
        temperature: of the sampling noise.
        plans: how many for each pair.
        execute: also in the simulator.
        goal: [x, y] in metres that ends are measured against; by default the expert's.
        seed: of starts and noise.
        mesh: devices; plans are cut over data and fsdp.
    """

    base: str
    reward: str
    out: pathlib.Path
    scales: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    t_stopgrads: tuple[int, ...] = (0, 2, 5, 10)
    n_guide_steps: int = 1
    step: Step = "posterior_mean"
    scale_by_variance: bool = False
    output: Literal["logit", "sigmoid"] = "logit"
    temperature: float = 1.0
    plans: int = 64
    execute: bool = False
    goal: tuple[float, float] | None = None
    seed: int = 0
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


def _load(config: SteerConfig | SweepConfig) -> tuple[TrajectoryModel, TrajectoryGuide, Any]:
    if config.plans < 1:
        raise InputError(f"plans must be 1 or more, not {config.plans}")
    if config.n_guide_steps < 1:
        raise InputError(f"n_guide_steps must be 1 or more, not {config.n_guide_steps}")
    check_seed(config.seed)
    if not 0 <= config.temperature < math.inf:
        raise InputError(f"temperature must be 0 or more, not {config.temperature}")
    base, guide = load_model(config.base), load_guide(config.reward)
    check_same_terms("base and reward", base, guide)
    climbed: Any = guide.guide
    if isinstance(climbed, DiscriminatorGuide):
        climbed = climbed.replace(output=config.output)  # pyright: ignore[reportAttributeAccessIssue]
    return base, guide, climbed


def run_steer(config: SteerConfig) -> pathlib.Path:
    """Plan, execute, measure, draw; returns the folder."""
    from matplotlib.figure import Figure

    base, guide, climbed = _load(config)
    layout, goal = goal_of(guide.space, config.goal)
    mesh = mesh_for(dataclasses.asdict(config.mesh))
    note_run(config.out, dataclasses.asdict(config))
    starts, key = starts_in(layout, config.plans, config.seed), jax.random.key(config.seed)
    shared: dict[str, Any] = dict(temperature=config.temperature, mesh=mesh)
    steered = plan(
        base,
        starts,
        key=key,
        reward=climbed,
        scale=config.scale,
        t_stopgrad=config.t_stopgrad,
        n_guide_steps=config.n_guide_steps,
        step=config.step,
        scale_by_variance=config.scale_by_variance,
        **shared,
    )
    found = {}
    drawn = {"unsteered": plan(base, starts, key=key, **shared), "steered": steered}
    places = {name: positions(x, base.space) for name, x in drawn.items()}
    for name, xy in places.items():
        found[name] = dataclasses.asdict(ends(layout, goal, xy, starts, base.space.stride))
        print(
            f"{name}: {found[name]['planned']:.2f} of plans end at the goal, "
            f"{found[name]['executed']:.2f} when executed"
        )
    np.savez_compressed(
        config.out / "plans.npz",
        plans=places["steered"],
        unsteered=places["unsteered"],
        starts=starts,
    )
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axis, (name, xy) in zip(figure.subplots(1, 2), places.items(), strict=True):
        draw_plans(axis, layout, xy[:64], goal)
        axis.set_title(f"{name}: {found[name]['executed']:.2f} end at the goal")
    figure.savefig(config.out / "steer.png", dpi=120)
    write_json(config.out / "steer.json", found | {"goal": goal.tolist(), "scale": config.scale})
    print(f"plans: {config.out}")
    return config.out


def run_sweep(config: SweepConfig) -> pathlib.Path:
    """Sweep, measure, print a table; returns the folder."""
    if not config.scales or not config.t_stopgrads:
        raise InputError("scales and t_stopgrads need a number each, or more")
    base, guide, climbed = _load(config)
    layout, goal = goal_of(guide.space, config.goal)
    mesh = mesh_for(dataclasses.asdict(config.mesh))
    note_run(config.out, dataclasses.asdict(config))
    starts = starts_in(layout, config.plans, config.seed)
    swept = plan_sweep(
        base,
        starts,
        key=jax.random.key(config.seed),
        reward=climbed,
        scales=config.scales,
        t_stopgrads=config.t_stopgrads,
        n_guide_steps=config.n_guide_steps,
        step=config.step,
        scale_by_variance=config.scale_by_variance,
        temperature=config.temperature,
        mesh=mesh,
    )
    rows = []
    kind = "executed" if config.execute else "planned"
    print(f"share of plans that end at the goal ({kind})")
    print("scale \\ t_stopgrad" + "".join(f"{stop:8d}" for stop in config.t_stopgrads))
    for scale, row in zip(config.scales, swept, strict=True):
        line = []
        for stop, x in zip(config.t_stopgrads, row, strict=True):
            xy = positions(x, base.space)
            found = ends(layout, goal, xy, starts, base.space.stride, execute=config.execute)
            rows.append({"scale": scale, "t_stopgrad": stop} | dataclasses.asdict(found))
            line.append(rows[-1][kind])
        print(f"{scale:18g}" + "".join(f"{value:8.2f}" for value in line))
    write_json(config.out / "sweep.json", rows)
    print(f"sweep: {config.out / 'sweep.json'}")
    return config.out


def draw_plans(
    axis: Any, layout: Maze, plans: np.ndarray, goal: Any = None, *, color: str = "#0072b2"
) -> None:
    """Plans [B, H, 2] in their maze: lines, a dot where each ends, a star for the goal."""
    draw_maze(axis, layout)
    axis.plot(*plans.transpose(2, 1, 0), color=color, lw=0.8, alpha=0.45)
    axis.plot(*plans[:, -1].T, ".", color="#1b2026", ms=4)
    if goal is not None:
        axis.plot(*goal, "*", color="#d55e00", mec="white", ms=14)
