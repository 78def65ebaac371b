"""What the maze study measures of a reward: where its map peaks, and where steered plans end."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from reward_jax.data.trajectory.space import TrajectoryGuide, TrajectoryModel
from reward_jax.planning.plan import plan_sweep, planner, precomputed, score_windows
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.extract import RelativeReward
from reward_jax.tasks.base import Outcome
from reward_jax.tasks.maze.task import MazeTask
from reward_jax.tasks.plane import HeatMap, Peak

__all__ = ["GUIDES", "each_seed", "map_of", "peak_at", "steered"]

GUIDES = ("reward", "logit", "sigmoid")  # that plans are steered by; a discriminator's last two


def map_of(
    task: MazeTask, guide: TrajectoryGuide, rows: Float[np.ndarray, "N H D"], bins: int
) -> HeatMap:
    """The heat map of a reward over windows (N of H steps, D wide)."""
    visited = guide.space.plans(rows).observations
    return task.plane.heat_map(visited, score_windows(guide.guide, rows), bins=bins)


def peak_at(task: MazeTask, found: HeatMap, goal: Any) -> dict[str, Any]:
    """The peak of a map beside the goal, as JSON."""
    peak = Peak.of(found, task.plane, goal)
    return {"metres": peak.distance, "in_cell": peak.at_goal, "at": peak.at.tolist()}


def each_seed(guide: TrajectoryGuide) -> list[TrajectoryGuide]:
    """The mean of a reward's seeds, then each seed."""
    reward = guide.guide
    assert isinstance(reward, RelativeReward) and reward.seeds
    seeds = [dataclasses.replace(guide, guide=reward.seed(i)) for i in range(reward.seeds)]
    return [guide, *seeds]


def steered(
    task: MazeTask,
    models: tuple[TrajectoryModel, TrajectoryModel],
    guides: tuple[TrajectoryGuide, TrajectoryGuide],
    goal: Any,
    scales: Sequence[float],
    *,
    plans: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Outcomes of base and expert, and of the base steered by reward and discriminator.

    models: base, expert. guides: the reward, the discriminator.
    """
    base, expert = models
    starts, key = task.starts(plans, seed), jax.random.key(seed)
    options: dict[str, Any] = dict(key=key, goal=goal)

    def rounded(outcome: Outcome) -> dict[str, Any]:
        return {k: None if v is None else round(v, 4) for k, v in outcome.means().items()}

    found = {
        "unsteered": rounded(task.execute(planner(base), starts, **options)),
        "expert": rounded(task.execute(planner(expert), starts, **options)),
    }
    reward, judge = (guide.guide for guide in guides)
    assert isinstance(judge, DiscriminatorGuide)
    sigmoid = judge.replace(output="sigmoid")  # pyright: ignore[reportAttributeAccessIssue]
    for name, one in zip(GUIDES, (reward, judge, sigmoid), strict=True):
        swept = plan_sweep(base, starts, key=key, guide=one, scales=scales, t_stopgrads=[0])
        for scale, x in zip(scales, swept[:, 0], strict=True):
            made = precomputed(base.space.plans(x))
            found[f"{name} {scale:g}"] = rounded(task.execute(made, starts, **options))
    return found
