"""What the maze study keeps of a reward: where its map peaks, and where steered plans end."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from reward_jax.data.trajectory.space import TrajectoryGuide, TrajectoryModel
from reward_jax.planning.plan import planner
from reward_jax.planning.steer import SweepOptions, outcomes, steer_by, sweep_outcomes
from reward_jax.tasks.base import Outcome
from reward_jax.tasks.maze.task import MazeTask
from reward_jax.tasks.plane import HeatMap, Peak

__all__ = ["GUIDES", "peak_at", "steered"]

GUIDES = ("reward", "logit", "sigmoid")  # that plans are steered by; a discriminator's last two


def peak_at(task: MazeTask, found: HeatMap, goal: Any) -> dict[str, Any]:
    """The peak of a map beside the goal, as JSON."""
    peak = Peak.of(found, task.plane, goal)
    return {"metres": peak.distance, "in_cell": peak.at_goal, "at": peak.at.tolist()}


def steered(
    task: MazeTask,
    models: tuple[TrajectoryModel, TrajectoryModel],
    guides: tuple[TrajectoryGuide, TrajectoryGuide],
    goal: Any,
    scales: Sequence[float],
    *,
    plans: int,
    seed: int,
    mesh: Mesh | None = None,
) -> dict[str, dict[str, Any]]:
    """Outcomes of base and expert, and of the base steered by reward and discriminator.

    models: base, expert. guides: the reward, the discriminator. mesh: plans are sharded over its
    data and fsdp axes.
    """
    base, expert = models
    reward, judge = guides
    starts, key = task.starts(plans, seed), jax.random.key(seed)
    planners = {"unsteered": planner(base, mesh=mesh), "expert": planner(expert, mesh=mesh)}
    found = outcomes(task, planners, starts, key=key, goal=goal)
    sweep = SweepOptions(scales=tuple(scales), t_stopgrads=(0,), execute=True)
    steerings = (
        steer_by(base, reward, goal=goal, mesh=mesh),
        steer_by(base, judge, goal=goal, output="logit", mesh=mesh),
        steer_by(base, judge, goal=goal, output="sigmoid", mesh=mesh),
    )
    for name, steering in zip(GUIDES, steerings, strict=True):
        for row in sweep_outcomes(steering, starts, sweep, key=key):
            found |= {f"{name} {one.scale:g}": one.outcome for one in row}
    return {name: _rounded(outcome) for name, outcome in found.items()}


def _rounded(outcome: Outcome) -> dict[str, Any]:
    return {k: None if v is None else round(v, 4) for k, v in outcome.means().items()}
