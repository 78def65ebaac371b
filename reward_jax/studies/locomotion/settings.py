"""Settings of the locomotion study, and what could not be studied with them."""

import dataclasses
import pathlib

from common_jax.cli.options import CheckpointOption, SeedOption
from common_jax.cli.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, check_ranges
from common_jax.errors import InputError
from reward_jax.data.trajectory.windows import HorizonOption
from reward_jax.planning.fit import Training
from reward_jax.planning.options import (
    DiffusionOption,
    NetworkOption,
    RewardNetOption,
    RolloutOption,
    ScalesOption,
    StopsOption,
)
from reward_jax.studies.base import AmountOption
from reward_jax.tasks.locomotion.collect import SETS
from reward_jax.tasks.locomotion.task import TASKS

__all__ = ["Config", "RobotSettings", "check"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobotSettings(RewardNetOption, NetworkOption, DiffusionOption, HorizonOption):
    """What one robot's models are.

    Args:
        base_training: of the base, and of the unseen one.
        expert_training: of the expert, which begins as the base.
        rounds: of matching; after the first, paths are those of the reward at hand.
    """

    horizon: PositiveInt = 8
    diffusion_steps: PositiveInt = 20
    base_training: Training = dataclasses.field(default_factory=Training)
    expert_training: Training = dataclasses.field(default_factory=Training)
    rounds: PositiveInt = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SeedOption, CheckpointOption, RolloutOption, StopsOption, ScalesOption, AmountOption):
    """Steer weak robots by what a strong one wants: returns of every arm, on one set of seeds.

    Args:
        out: folder of the study; what is there already is kept.
        robots: a robot's name -> its models; those that are studied.
        base_data: the set that bases learn from.
        expert_data: the set that experts learn from.
        unseen_data: the set of a base that no reward has seen, in whose steering it is tried; ""
            for none.
        environments: test episodes of every arm; of the reward, for each of its seeds.
        validation: episodes for each scale and t_stopgrad, on seeds of their own, of which an
            arm's best are chosen.
        temperatures: of the unsteered base, as controls.
    """

    out: pathlib.Path = pathlib.Path("runs/locomotion-study")
    robots: dict[str, RobotSettings] = dataclasses.field(
        default_factory=lambda: {name: RobotSettings() for name in TASKS}
    )
    base_data: str = "medium-replay"
    expert_data: str = "expert"
    unseen_data: str = "medium"
    base_episodes: PositiveInt = 200
    expert_episodes: PositiveInt = 100
    environments: PositiveInt = 64
    validation: PositiveInt = 16
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    t_stopgrads: tuple[NonNegativeInt, ...] = (0,)
    temperatures: tuple[NonNegativeFloat, ...] = (0.0, 0.5)


def check(config: Config) -> None:
    """InputError for what would fail after hours of training."""
    check_ranges(config)
    if not config.robots:
        raise InputError(f"robots is empty: give one of {', '.join(TASKS)}")
    for name, own in config.robots.items():
        if name not in TASKS:
            raise InputError(f"robots: {name!r} is none; there are {', '.join(TASKS)}")
        own.network.check(own.horizon)
        own.matching.check()
        if own.matching.x_t != "mixed":
            raise InputError(
                f"robots.{name}.matching.x_t is {own.matching.x_t}, but the study matches on "
                "windows of both models: leave it out, or set mixed"
            )
        if own.expert_training.prediction != own.base_training.prediction:
            raise InputError(
                f"robots.{name}: expert_training.prediction must be base_training.prediction, for "
                "experts begin as their base"
            )
    for option in ("base_data", "expert_data", "unseen_data"):
        given = getattr(config, option)
        if given not in SETS and not (option == "unseen_data" and not given):
            raise InputError(f"{option} is {given!r}: give one of {', '.join(SETS)}")
    if not config.scales or not config.t_stopgrads:
        raise InputError("scales and t_stopgrads need a number each, or more")
