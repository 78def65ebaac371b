"""What `steer` and `sweep` share: a base, what steers it, and how."""

import dataclasses
import pathlib
from typing import Any, Literal

from jax.sharding import Mesh

from common_jax.cli.options import MeshOptions
from common_jax.cli.ranges import PositiveInt, Seed, check_ranges
from common_jax.errors import InputError
from common_jax.mesh import mesh_for
from reward_jax.data.trajectory.checkpoint import load_guide, load_model
from reward_jax.data.trajectory.convert import expert_in_base_coordinates
from reward_jax.data.trajectory.space import TrajectoryModel, check_steers
from reward_jax.planning.plan import planner
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.gradients import Guide, ScoreDifference
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.tasks.base import Planner, Task
from reward_jax.tasks.find import task_of

__all__ = ["STEERED", "Steering", "SteeringConfig", "load"]


STEERED = GuidanceOptions(scale=2.0)  # where nothing is swept: the scale that served best


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """Options of both commands.

    Args:
        base: the denoiser that is steered, a file or a run.
        reward: what steers it: a reward or a discriminator, a file or a run.
        expert: or an expert's denoiser: the raw difference of both scores steers, without any
            reward (the baseline that it is).
        out: folder of what is found.
        guidance: how plans are drawn and steered.
        output: of a discriminator: logit, or sigmoid.
        plans: how many, from starts that the task draws.
        goal: what outcomes are measured against, such as [x, y]; by default the expert's goal.
        seed: of starts and noise.
        mesh: devices; plans are sharded over data and fsdp.
    """

    base: str
    reward: str | None = None
    expert: str | None = None
    out: pathlib.Path
    guidance: GuidanceOptions = dataclasses.field(default_factory=GuidanceOptions)
    output: Literal["logit", "sigmoid"] = "logit"
    plans: PositiveInt = 256
    goal: str | tuple[float, ...] | None = None
    seed: Seed = 0
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


@dataclasses.dataclass(frozen=True)
class Steering:
    """A base, what steers it, and the world that it plans in."""

    base: TrajectoryModel
    guide: Guide
    task: Task
    goal: Any
    options: GuidanceOptions
    mesh: Mesh | None

    def planner(self, *, steered: bool = True, **options: Any) -> Planner:
        """Of the base, with these options in place of some."""
        now = dataclasses.replace(self.options, **options)
        return planner(
            self.base, guide=self.guide if steered else None, options=now, mesh=self.mesh
        )


def load(config: SteeringConfig) -> Steering:
    """Read models; InputError, before anything is written, where they do not fit one another."""
    check_ranges(config)
    config.guidance.made_sampler()
    if (config.reward is None) == (config.expert is None):
        raise InputError("give --reward, or --expert for the raw difference of the scores")
    base = load_model(config.base)
    if config.reward is not None:
        found = load_guide(config.reward)
        check_steers("base and reward", base, found)
        guide, about = found.guide, found.space.about
        if isinstance(guide, DiscriminatorGuide):
            guide = dataclasses.replace(guide, output=config.output)
    else:
        expert = load_model(config.expert or "")
        score, notes = expert_in_base_coordinates(base, expert)
        for note in notes:
            print(f"note: {note}")
        guide, about = ScoreDifference(base.denoiser, score), expert.space.about
    task = task_of(about)
    goal = task.goal(about.get("goal") if config.goal is None else config.goal)
    mesh = mesh_for(dataclasses.asdict(config.mesh))
    return Steering(base, guide, task, goal, config.guidance, mesh)
