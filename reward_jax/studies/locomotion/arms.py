"""The arms of the locomotion study: what steers a base, how strongly, and what comes of it.

An arm's guidance is chosen on validation seeds, and its returns are of test seeds, the same for
all arms, so that they can be compared row by row.

Legend: N episodes, S reward seeds.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from reward_jax.data.trajectory.space import TrajectoryModel
from reward_jax.planning.plan import planner
from reward_jax.reward.gradients import Guide
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.tasks.base import Outcome, Rollout
from reward_jax.tasks.locomotion.task import LocomotionTask

__all__ = ["Arm", "World", "choose", "compared", "returns", "summary"]


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """A model that plans, and what guides it.

    seeds: S, where the guide steers blocks of rows by a seed each: every block is an episode set.
    """

    model: TrajectoryModel
    guide: Guide | None = None
    seeds: int = 1


@dataclasses.dataclass(frozen=True)
class World:
    """Where arms act. seed: of starts and noise."""

    task: LocomotionTask
    rollout: Rollout
    seed: int


def returns(arm: Arm, world: World, count: int, options: GuidanceOptions) -> Outcome:
    """Episodes of an arm: `count` for each seed of its guide, each set from the same starts."""
    starts = np.tile(world.task.starts(count, world.seed), (arm.seeds, 1))
    acts = planner(arm.model, guide=arm.guide, options=options)
    key = jax.random.key(world.seed)
    return world.task.execute(acts, starts, key=key, goal=None, rollout=world.rollout)


def choose(
    arm: Arm,
    world: World,
    count: int,
    candidates: Sequence[GuidanceOptions],
    done: Callable[[str], None] | None = None,
) -> tuple[GuidanceOptions, list[dict[str, Any]]]:
    """The guidance of the highest mean return on a world's seeds, and what each came to."""
    found = []
    for options in candidates:
        mean = float(returns(arm, world, count, options).measured["return"].mean())  # pyright: ignore[reportOptionalMemberAccess]
        row = {"scale": options.scale, "t_stopgrad": options.t_stopgrad, "return": mean}
        found.append(row)
        if done:
            done(f"scale {options.scale:g}, t_stopgrad {options.t_stopgrad}: {mean:.0f}")
    best = max(range(len(found)), key=lambda index: found[index]["return"])
    return candidates[best], found


def summary(
    arm: Arm, outcome: Outcome, task: LocomotionTask, options: GuidanceOptions
) -> dict[str, Any]:
    """An arm's returns, as JSON: errors over environments and seeds apart; with its settings."""
    total = np.asarray(outcome.measured["return"], np.float64)
    by_seed = total.reshape(arm.seeds, -1)
    each = by_seed.mean(axis=0)  # one an environment, the mean over seeds
    return {
        "mean": float(total.mean()),
        "standard_error": error_of(each),
        "seed_standard_error": error_of(by_seed.mean(axis=1)) if arm.seeds > 1 else None,
        "normalized": float(task.robot.normalized(total).mean()),
        "episodes": len(total),
        "steps": float(np.asarray(outcome.measured["steps"], np.float64).mean()),
        "returns": each.round(3).tolist(),
        "seed_returns": by_seed.mean(axis=1).round(3).tolist(),
        "settings": {
            "scale": options.scale if arm.guide else 0.0,
            "t_stopgrad": options.t_stopgrad,
            "temperature": options.temperature,
            "sampler": options.sampler,
        },
        "seconds": {name: round(value, 2) for name, value in outcome.seconds.items()},
    }


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How much more one arm returns than another, environment by environment, and its error."""
    gap = np.asarray(one["returns"]) - np.asarray(other["returns"])
    return {"mean": float(gap.mean()), "standard_error": error_of(gap)}


def error_of(values: Float[np.ndarray, " N"]) -> float:
    """The standard error of a mean; 0 for one value."""
    values = np.asarray(values, np.float64)
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
