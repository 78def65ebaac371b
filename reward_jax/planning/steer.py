"""A base, steered by a reward, a discriminator or the raw difference of two scores.

    steering = steer_by(base, guide)
    starts = steering.task.starts(256, seed=0)
    for name, outcome in both_outcomes(steering, starts, key=key).items():
        print(name, outcome.means())

Legend: B plans, O observation width, S guidance scales.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from common_jax.cli.options import DeviceOption, SeedOption
from common_jax.cli.ranges import check_ranges
from common_jax.errors import InputError
from common_jax.mesh import fetch, mesh_for
from reward_jax.data.checkpoint import load_guide, load_model
from reward_jax.data.model import SpaceGuide, SpaceModel
from reward_jax.planning.kinds import check_own, kind_of_model, kind_of_space
from reward_jax.planning.options import (
    BaseOption,
    FolderOption,
    GoalOption,
    GuidanceOption,
    RolloutOption,
    ScalesOption,
    StopsOption,
)
from reward_jax.planning.plan import plan_sweep, planner, precomputed
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.gradients import Guide, ScoreDifference
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.reward.relative import RelativeReward, SeedBlocks
from reward_jax.tasks.base import Outcome, Planner, Rollout, Task
from reward_jax.tasks.find import task_and_goal

__all__ = [
    "Output",
    "Steering",
    "SteeringOptions",
    "SweepOptions",
    "Swept",
    "both_outcomes",
    "errors_of",
    "load_steering",
    "outcomes",
    "steer_by",
    "sweep_outcomes",
]

Output = Literal["logit", "sigmoid"]


@dataclasses.dataclass(frozen=True)
class Steering:
    """A base, what steers it, and the world that it plans in.

    goal: what outcomes are measured against. options: how plans are drawn and steered. rollout:
    how they are acted on. mesh: plans are sharded over its data and fsdp axes. notes: what a user
    should know of it, sentences. seeds: S, where the guide has a block of plans for each seed.
    """

    base: SpaceModel[Any]
    guide: Guide
    task: Task
    goal: Any
    options: GuidanceOptions = dataclasses.field(default_factory=GuidanceOptions)
    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    mesh: Mesh | None = None
    notes: tuple[str, ...] = ()
    seeds: int = 1

    def planner(self, *, steered: bool = True, **options: Any) -> Planner:
        """Of the base, with these options in place of some."""
        now = dataclasses.replace(self.options, **options)
        return planner(
            self.base, guide=self.guide if steered else None, options=now, mesh=self.mesh
        )


def steer_by(
    base: SpaceModel[Any],
    by: SpaceGuide[Any] | SpaceModel[Any],
    *,
    goal: Any = None,
    output: Output = "logit",
    options: GuidanceOptions | None = None,
    rollout: Rollout | None = None,
    mesh: Mesh | None = None,
    by_seed: bool = False,
) -> Steering:
    """A base with what steers it; they must fit one another, or InputError is raised.

    by: a reward or a discriminator; or an expert, for the raw difference of both scores, without
    any reward. goal: by default the one that the data of `by` had. output: of a discriminator.
    by_seed: each seed of a reward steers plans of its own, from every start; by default their mean
    steers.
    """
    notes: list[str] = []
    kind = kind_of_space(base.space)
    if isinstance(by, SpaceModel):
        score, notes = kind.expert_score(base, by)
        guide = ScoreDifference(base.denoiser, score)
    else:
        kind.check_steers("base and reward", base, by)
        guide = by.guide
        if isinstance(guide, DiscriminatorGuide):
            guide = dataclasses.replace(guide, output=output)
    task, goal = task_and_goal(by.space.about, goal)
    how = options or GuidanceOptions(), rollout or Rollout()
    if task.replans:
        how[1].check(base.space.shape[0], task.name)
    if not by_seed:
        return Steering(base, guide, task, goal, *how, mesh, tuple(notes))
    reward = guide if isinstance(guide, RelativeReward) else None
    seeds = (reward.seeds or 1) if reward else 0
    if reward is None or seeds < 2:
        what = "this reward has one" if reward else "what steers has none"
        raise InputError(f"by_seed is of a reward of several seeds, and {what}: leave it out")
    return Steering(base, SeedBlocks(reward), task, goal, *how, mesh, tuple(notes), seeds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteeringOptions(
    SeedOption, DeviceOption, FolderOption, GoalOption, RolloutOption, GuidanceOption, BaseOption
):
    """What steers a base, and how.

    Args:
        reward: what steers it: a reward or a discriminator, a file or a run.
        expert: or an expert's denoiser: the raw difference of both scores steers, without any
            reward (the baseline that it is).
        output: of a discriminator: logit, or sigmoid.
        by_seed: each seed of a reward steers plans of its own, as many, and errors are told over
            starts and over seeds apart; by default the mean of the seeds steers.
    """

    reward: str | None = None
    expert: str | None = None
    output: Output = "logit"
    by_seed: bool = False


def load_steering(options: SteeringOptions) -> Steering:
    """Read models; InputError, before anything is written, where they do not fit one another."""
    check_ranges(options)
    options.guidance.made_sampler()
    if options.guidance.skip and not options.rollout.warm_start:
        raise InputError("guidance.skip is of warm starts: give --rollout.warm_start, too")
    if (options.reward is None) == (options.expert is None):
        raise InputError("give --reward, or --expert for the raw difference of the scores")
    mesh = mesh_for(dataclasses.asdict(options.mesh))
    kind = kind_of_model(options.base)
    check_own(kind, f"{options.base} is", options)
    base = load_model(options.base, kind.space, mesh)
    if options.reward is not None:
        by = load_guide(options.reward, kind.space, mesh)
    else:
        by = load_model(options.expert or "", kind.space, mesh)
    return steer_by(
        base,
        by,
        goal=options.goal,
        output=options.output,
        options=options.guidance,
        rollout=options.rollout,
        mesh=mesh,
        by_seed=options.by_seed,
    )


def outcomes(
    task: Task,
    planners: Mapping[str, Planner],
    starts: Float[np.ndarray, "B O"],
    *,
    key: Key[Array, ""],
    goal: Any,
    rollout: Rollout | None = None,
) -> dict[str, Outcome]:
    """What comes of each planner, all from the same starts and the same noise."""
    given: dict[str, Any] = dict(key=key, goal=goal, rollout=rollout)
    return {name: task.execute(one, starts, **given) for name, one in planners.items()}


def both_outcomes(
    steering: Steering, starts: Float[np.ndarray, "B O"], *, key: Key[Array, ""]
) -> dict[str, Outcome]:
    """Of the base "unsteered" and "steered", where seeds are apart by each from every start."""
    given: dict[str, Any] = dict(key=key, goal=steering.goal, rollout=steering.rollout)
    execute = steering.task.execute
    rows = np.tile(starts, (steering.seeds, 1))
    unsteered = execute(steering.planner(steered=False), starts, **given)
    steered = execute(steering.planner(), rows, **given)
    steered = dataclasses.replace(steered, seeds=steering.seeds)
    return {"unsteered": unsteered, "steered": steered}


def errors_of(task: Task, outcome: Outcome) -> str:
    """Standard errors of the measure that a table shows, over starts and seeds, to end a line."""
    over, seeds = outcome.standard_errors(), outcome.seed_standard_errors()
    for measure in (task.shown_measure(executed=executed) for executed in (True, False)):
        if measure is None or (error := over[measure.name]) is None:
            continue
        digits, starts = measure.digits, len(outcome.shown) // outcome.seeds
        shown = f"; {measure.heading}: standard error {error:.{digits}f} over {starts} starts"
        apart = seeds[measure.name]
        also = "" if apart is None else f", {apart:.{digits}f} over {outcome.seeds} reward seeds"
        return shown + also
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(StopsOption, ScalesOption):
    """What is swept: every guidance scale with every t_stopgrad.

    Args:
        execute: in the world, too, and not in plans alone.
    """

    execute: bool = False

    def check(self) -> None:
        """Raise InputError for an empty sweep."""
        if not self.scales or not self.t_stopgrads:
            raise InputError("scales and t_stopgrads need a number each, or more")


@dataclasses.dataclass(frozen=True, eq=False)
class Swept:
    """The outcome at one scale and t_stopgrad."""

    scale: float
    t_stopgrad: int
    outcome: Outcome


def sweep_outcomes(
    steering: Steering,
    starts: Float[np.ndarray, "B O"],
    options: SweepOptions,
    *,
    key: Key[Array, ""],
) -> Iterator[list[Swept]]:
    """For each scale, in turn, the outcome at every t_stopgrad, from the same starts and noise.

    Where the task plans once, all plans are made in one compiled call; where it plans as it goes,
    each pair of settings by itself. Of the steering's options, scale and t_stopgrad are not used.
    """
    options.check()
    starts = np.tile(starts, (steering.seeds, 1))
    given: dict[str, Any] = dict(
        key=key, goal=steering.goal, simulate=options.execute, rollout=steering.rollout
    )

    def executed(one: Planner) -> Outcome:
        found = steering.task.execute(one, starts, **given)
        return dataclasses.replace(found, seeds=steering.seeds)

    return (
        [
            Swept(scale, stop, executed(one))
            for stop, one in zip(options.t_stopgrads, planners, strict=True)
        ]
        for scale, planners in _planners(steering, starts, options, key)
    )


def _planners(
    steering: Steering,
    starts: Float[np.ndarray, "B O"],
    options: SweepOptions,
    key: Key[Array, ""],
) -> Iterator[tuple[float, list[Planner]]]:
    """Each scale, with a planner for each t_stopgrad."""
    scales, stops = options.scales, options.t_stopgrads
    if steering.task.replans:
        for scale in scales:
            yield scale, [steering.planner(scale=scale, t_stopgrad=stop) for stop in stops]
        return
    swept = plan_sweep(
        steering.base,
        starts,
        key=key,
        guide=steering.guide,
        scales=scales,
        t_stopgrads=stops,
        options=steering.options,
        mesh=steering.mesh,
    )
    for scale, row in zip(scales, fetch(swept), strict=True):
        yield scale, [precomputed(steering.base.space.plans(x)) for x in row]
