"""The arms of the locomotion study: what steers a base, how strongly, and what comes of it.

An arm's guidance is chosen on validation seeds, and its returns are of test seeds, the same for
all arms, so that they can be compared row by row.

Legend: N episodes, S reward seeds.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common_jax.distributed import by_first
from common_jax.errors import InputError
from common_jax.io.files import read_json, write_json
from reward_jax.data.trajectory.space import TrajectoryModel
from reward_jax.planning.plan import planner
from reward_jax.reward.gradients import Guide
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.studies.sweep import sweep
from reward_jax.tasks.base import Outcome, Rollout, error_of
from reward_jax.tasks.locomotion.task import LocomotionTask

__all__ = ["Arm", "World", "best_of", "choose", "compared", "exceeds", "returns", "summary"]

_ROW = dict.fromkeys(("scale", "t_stopgrad", "return"))


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
    """Where arms act.

    seed: of starts and noise. mesh: plans are sharded over it.
    """

    task: LocomotionTask
    rollout: Rollout
    seed: int
    mesh: Mesh | None = None


def returns(arm: Arm, world: World, count: int, options: GuidanceOptions) -> Outcome:
    """Episodes of an arm: `count` for each seed of its guide, each set from the same starts."""
    starts = np.tile(world.task.starts(count, world.seed), (arm.seeds, 1))
    acts = planner(arm.model, guide=arm.guide, options=options, mesh=world.mesh)
    key = jax.random.key(world.seed)
    found = world.task.execute(acts, starts, key=key, goal=None, rollout=world.rollout)
    return replace(found, seeds=arm.seeds)


def choose(
    arm: Arm,
    world: World,
    count: int,
    options: GuidanceOptions,
    scales: Sequence[float],
    stops: Sequence[int],
    path: pathlib.Path,
    done: Callable[[str], None] | None = None,
) -> tuple[GuidanceOptions, list[dict[str, Any]]]:
    """The guidance of the highest mean return on a world's seeds, and what each came to.

    Every scale is tried at the first t_stopgrad; then, while the best is the smallest or the
    largest of several, the next one beyond; then the other stops at the best scale. count:
    episodes of each. path: file of what was tried, from which a sweep that was cut short goes on.
    """
    # A scale that one process tries, and another does not, would have them wait for one another.
    before = by_first(lambda: read_json(path, [_ROW]) if path.exists() else [])
    known = {(row["scale"], row["t_stopgrad"]): row for row in before}
    rows: list[dict[str, Any]] = []

    def attempt(one: GuidanceOptions) -> None:
        at = one.scale, one.t_stopgrad
        if at not in known:
            known[at] = _try(arm, world, count, one)
            write_json(path, list(known.values()))
        rows.append(row := known[at])
        if done:
            said = row["failed"] if row["return"] is None else f"{row['return']:.0f}"
            done(f"scale {one.scale:g}, t_stopgrad {one.t_stopgrad}: {said}")

    sweep(
        scales,
        lambda scale: attempt(replace(options, scale=scale, t_stopgrad=stops[0])),
        lambda: (_best(rows) or {}).get("scale"),
    )
    best = best_of(rows, options)
    if best is None:
        raise InputError(f"plans of every scale fail: {rows[-1]['failed']}; give lower scales")
    for stop in stops[1:]:
        attempt(replace(best, t_stopgrad=stop))
    return best_of(rows, options) or best, rows


def _try(arm: Arm, world: World, count: int, options: GuidanceOptions) -> dict[str, Any]:
    """What a guidance comes to, a row of a sweep."""
    row: dict[str, Any] = {"scale": options.scale, "t_stopgrad": options.t_stopgrad}
    try:
        total = np.asarray(returns(arm, world, count, options).measured["return"])
    except InputError as error:  # plans that are not finite, at a scale that is too high
        return row | {"return": None, "failed": str(error)}
    return row | {"return": float(total.mean())}


def best_of(rows: Sequence[dict[str, Any]], options: GuidanceOptions) -> GuidanceOptions | None:
    """Options with scale and t_stopgrad of the highest return; None where all have failed."""
    if (best := _best(rows)) is None:
        return None
    return replace(options, scale=best["scale"], t_stopgrad=best["t_stopgrad"])


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    lived = [row for row in rows if row["return"] is not None]
    return max(lived, key=lambda row: row["return"], default=None)


def summary(
    arm: Arm, outcome: Outcome, task: LocomotionTask, options: GuidanceOptions
) -> dict[str, Any]:
    """An arm's returns, as JSON: errors over environments and seeds apart; with its settings."""
    total = np.asarray(outcome.measured["return"], np.float64)
    by_seed = total.reshape(outcome.seeds, -1)
    return {
        "mean": float(total.mean()),
        "standard_error": outcome.standard_errors()["return"],
        "seed_standard_error": outcome.seed_standard_errors()["return"],
        "normalized": float(task.robot.normalized(total).mean()),
        "episodes": len(total),
        "steps": float(np.asarray(outcome.measured["steps"], np.float64).mean()),
        "returns": by_seed.mean(axis=0).round(3).tolist(),
        "seed_returns": by_seed.mean(axis=1).round(3).tolist(),
        "settings": dataclasses.asdict(options) | ({} if arm.guide else {"scale": 0.0}),
        "seconds": {name: round(value, 2) for name, value in outcome.seconds.items()},
    }


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float | None]:
    """How much more one arm returns than another, and its errors, over environments and seeds.

    Environments are compared one by one; an arm of several seeds by its mean over them.
    """
    gap = np.asarray(one["returns"]) - np.asarray(other["returns"])
    errors = [arm["seed_standard_error"] for arm in (one, other)]
    seeds = None if errors == [None, None] else math.hypot(*(e or 0.0 for e in errors))
    return {
        "mean": float(gap.mean()),
        "standard_error": error_of(gap),
        "seed_standard_error": seeds,
    }


def exceeds(gap: dict[str, Any]) -> bool:
    """Whether a difference of `compared` is above 0 by two standard errors, of both kinds."""
    error = math.hypot(gap["standard_error"], gap["seed_standard_error"] or 0.0)
    return gap["mean"] > 2 * error > 0
