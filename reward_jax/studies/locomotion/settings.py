"""Settings of the locomotion study, and what could not be studied with them."""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any, Literal, TypeVar

from common_jax.cli.options import CheckpointOption, DeviceOption, SeedOption
from common_jax.cli.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_ranges,
)
from common_jax.errors import InputError
from reward_jax.data.trajectory.windows import HorizonOption
from reward_jax.planning.extract import Matching, Noised, RewardOptions
from reward_jax.planning.fit import Training
from reward_jax.planning.options import (
    DiffusionOption,
    NetworkOption,
    RewardNetOption,
    RolloutOption,
    ScalesOption,
    StopsOption,
)
from reward_jax.reward.targets import GradientAt, Target
from reward_jax.studies.base import AmountOption, WorkersOption
from reward_jax.tasks.locomotion.collect import SETS
from reward_jax.tasks.locomotion.task import TASKS

__all__ = [
    "Ablation",
    "Config",
    "DataOptions",
    "Rounds",
    "RobotSettings",
    "ablated",
    "changed",
    "check",
    "given",
    "sources",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds(RewardNetOption):
    """How a reward is matched; a cheap one likewise, to the gradient of the extracted one.

    Args:
        rounds: of matching; after the first, paths are those of the reward at hand.
        met: after the first round paths begin where the base comes by in its world, steered by the
            reward at hand (matching.path_scale, as many episodes as `validation`), not in data.
    """

    rounds: PositiveInt = 1
    met: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data of others to learn from, whole, in place of sets that are recorded here.

    An HDF5 file in D4RL's layout, a folder of a Minari data set, or its id as in
    minari:NAMESPACE/NAME-v0; null for the study's set.

    Args:
        base: in place of base_data.
        expert: in place of expert_data.
        unseen: in place of unseen_data.
    """

    base: str | None = None
    expert: str | None = None
    unseen: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobotSettings(Rounds, NetworkOption, DiffusionOption, HorizonOption):
    """What one robot's models are.

    Args:
        data: of others, that they learn from.
        base_training: of the base, and of the unseen one.
        expert_training: of the expert, which begins as the base.
        distilled: of the reward, into a cheap network; null for none.
    """

    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    horizon: PositiveInt = 8
    diffusion_steps: PositiveInt = 20
    base_training: Training = dataclasses.field(default_factory=Training)
    expert_training: Training = dataclasses.field(default_factory=Training)
    distilled: Rounds | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """One change to a robot's study, all else the same; null keeps what stands there.

    An option without words here is that of its name elsewhere: of the study, or of the robot's own
    settings, its `reward` or its `matching`.

    Args:
        robot: whose.
        base_episodes: of data of others, spread evenly over them.
        expert_episodes: likewise.
        execute: steps of a plan that are executed.
        sampling_steps: of DDIM, in place of the ancestral sampler.
        skip: of them that a plan leaves out, which begins with what is left of the last one.
    """

    robot: str = "halfcheetah"
    base_episodes: PositiveInt | None = None
    expert_episodes: PositiveInt | None = None
    seed: NonNegativeInt | None = None
    steps: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    path_draws: NonNegativeInt | None = None
    action_weight: NonNegativeFloat | None = None
    target: Target | None = None
    gradient_at: GradientAt | None = None
    x_t: Noised | None = None
    pin: bool | None = None
    t_weights: tuple[NonNegativeFloat, ...] | None = None
    rounds: PositiveInt | None = None
    met: bool | None = None
    kind: Literal["window", "half_unet", "energy"] | None = None
    widths: tuple[PositiveInt, ...] | None = None
    execute: PositiveInt | None = None
    sampling_steps: PositiveInt | None = None
    scales: tuple[PositiveFloat, ...] | None = None
    skip: PositiveInt | None = None


Changed = TypeVar("Changed", "Config", RobotSettings, RewardOptions, Matching)


def ablated(config: "Config", name: str) -> "Config":
    """The settings of an ablation: of its robot alone, with one thing changed."""
    change = config.ablations[name]
    own = config.robots[change.robot]
    reward, matching = _replaced(own.reward, change), _replaced(own.matching, change)
    own = _replaced(own, change, reward=reward, matching=matching, distilled=None)
    acts = given(execute=change.execute, warm_start=True if change.skip else None)
    rollout = dataclasses.replace(config.rollout, **acts)
    return _replaced(config, change, robots={change.robot: own}, rollout=rollout, ablations={})


def _replaced(settings: Changed, change: Ablation, **others: Any) -> Changed:
    """Settings with what an ablation gives of the options that they have; and with others."""
    own = {name: value for name, value in vars(change).items() if hasattr(settings, name)}
    return dataclasses.replace(settings, **given(**own), **others)


def sources(config: "Config", name: str) -> dict[str, str]:
    """What a robot's base, expert and unseen base learn from: a set, or data of others.

    Without "unseen" where the settings have none.
    """
    sets = {"base": config.base_data, "expert": config.expert_data, "unseen": config.unseen_data}
    own = dataclasses.asdict(config.robots[name].data)
    return given(**{which: own[which] or sets[which] for which in sets})


def given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def changed(ablation: Ablation) -> dict[str, Any]:
    """What an ablation changes, by name, as JSON holds it."""
    every = json.loads(json.dumps(dataclasses.asdict(ablation)))
    return {name: value for name, value in every.items() if name != "robot" and value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    SeedOption,
    DeviceOption,
    WorkersOption,
    CheckpointOption,
    RolloutOption,
    StopsOption,
    ScalesOption,
    AmountOption,
):
    """Steer weak robots by what a strong one wants: returns of every arm, on one set of seeds.

    Args:
        out: folder of the study; what is there already is kept.
        robots: a robot's name -> its models; those that are studied.
        base_data: the set that bases learn from; a robot's `data` may say another.
        expert_data: the set that experts learn from.
        unseen_data: the set of a base that no reward has seen, in whose steering it is tried; null
            for none.
        environments: test episodes of every arm; of the reward, for each of its seeds.
        validation: episodes for each scale, and while the best is an edge for the next one beyond,
            then for each t_stopgrad at the best, on seeds of their own, of which an arm's best are
            chosen.
        temperatures: of the unsteered base, as controls.
        ablations: a name -> one change, of which only the reward and its bounds are measured.
    """

    out: pathlib.Path = pathlib.Path("runs/locomotion-study")
    robots: dict[str, RobotSettings] = dataclasses.field(
        default_factory=lambda: {name: RobotSettings() for name in TASKS}
    )
    base_data: str = "medium-replay"
    expert_data: str = "expert"
    unseen_data: str | None = "medium"
    base_episodes: PositiveInt = 200
    expert_episodes: PositiveInt = 100
    environments: PositiveInt = 64
    validation: PositiveInt = 16
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    t_stopgrads: tuple[NonNegativeInt, ...] = (0,)
    temperatures: tuple[NonNegativeFloat, ...] = (0.0, 0.5, 0.8)
    ablations: dict[str, Ablation] = dataclasses.field(default_factory=dict)


def check(config: Config) -> None:
    """InputError for what would fail after hours of training."""
    check_ranges(config)
    if not config.robots:
        raise InputError(f"robots is empty: give one of {', '.join(TASKS)}")
    for name in config.robots:
        _check_robot(config, name)
    for name in config.ablations:
        _check_ablation(config, name)
    for option in ("base_data", "expert_data", "unseen_data"):
        source = getattr(config, option)
        if source not in SETS and not (option == "unseen_data" and source is None):
            raise InputError(
                f"{option} is {source!r}: give one of {', '.join(SETS)}; data of others are a "
                f"robot's own, robots.ROBOT.data.{option.removesuffix('_data')}"
            )
    if not config.scales or not config.t_stopgrads:
        raise InputError("scales and t_stopgrads need a number each, or more")
    if not all(math.isfinite(scale) and scale > 0 for scale in config.scales):
        raise InputError(f"scales are {', '.join(map(str, config.scales))}: give numbers above 0")
    if config.environments < 2 or config.validation < 2:
        raise InputError("environments and validation must be 2 or more: errors are of several")
    for name in config.robots:
        for which, source in sources(config, name).items():
            option = "expert_episodes" if which == "expert" else "base_episodes"
            parts = len(SETS.get(source, ()))
            if getattr(config, option) < parts:
                raise InputError(
                    f"{option} is {getattr(config, option)}: the set {source} has {parts} parts; "
                    "record as many"
                )


def _check_robot(config: Config, name: str) -> None:
    """InputError for what one robot's models cannot be."""
    if name not in TASKS:
        raise InputError(f"robots: {name!r} is none; there are {', '.join(TASKS)}")
    own = config.robots[name]
    own.network.check(own.horizon)
    config.rollout.check(own.horizon, name)
    if any(stop >= own.diffusion_steps for stop in config.t_stopgrads):
        raise InputError(
            f"t_stopgrads are {', '.join(map(str, config.t_stopgrads))}, but t of {name} goes "
            f"from 0 to {own.diffusion_steps - 1}: a guide that stops above it never acts; "
            f"give numbers below {own.diffusion_steps}"
        )
    if own.distilled and own.distilled.reward.kind == "energy":
        raise InputError(
            f"robots.{name}.distilled.reward.kind is energy, the dear one: give window"
        )
    learned: dict[str, Rounds] = {"": own} | (
        {"distilled.": own.distilled} if own.distilled else {}
    )
    for where, one in learned.items():
        try:
            one.reward.check(own.horizon)
        except InputError as error:
            raise InputError(f"robots.{name}.{where}reward: {error}") from None
    if own.matching.batch_size % 2:
        raise InputError(
            f"robots.{name}.matching.batch_size is {own.matching.batch_size}: give an even "
            "number, for a discriminator sees as many rows of each data set"
        )
    for where, one in learned.items():
        one.matching.check(own.diffusion_steps)
        if one.met and not (one.rounds > 1 and one.matching.path_draws and one.matching.pin):
            raise InputError(
                f"robots.{name}.{where}met is of paths of a second round that begin at a state: "
                "give rounds 2 or more, matching.path_draws, and matching.pin true"
            )
    if own.expert_training.prediction != own.base_training.prediction:
        raise InputError(
            f"robots.{name}: expert_training.prediction must be base_training.prediction, for "
            "experts begin as their base"
        )


def _check_ablation(config: Config, name: str) -> None:
    """InputError for a change that is none, or that could not be studied."""
    ablation = config.ablations[name]
    if not re.fullmatch(r"[a-z0-9][a-z0-9 _.-]*", name):
        raise InputError(
            f"ablations: {name!r} names a folder: give small letters, digits and spaces"
        )
    if ablation.robot not in config.robots:
        raise InputError(
            f"ablations.{name}.robot is {ablation.robot!r}: give one of "
            + ", ".join(config.robots)
        )
    steps = config.robots[ablation.robot].diffusion_steps
    if (ablation.sampling_steps or 0) > steps:
        raise InputError(
            f"ablations.{name}.sampling_steps is {ablation.sampling_steps}: there are {steps}"
        )
    if ablation.skip and ablation.skip >= (ablation.sampling_steps or 0):
        raise InputError(
            f"ablations.{name}.skip is {ablation.skip}: give sampling_steps, too, and more"
        )
    if not changed(ablation):
        options = [field.name for field in dataclasses.fields(Ablation)][1:]
        raise InputError(f"ablations.{name} changes nothing: give one of {', '.join(options)}")
    try:
        check(ablated(config, name))
    except InputError as error:
        raise InputError(f"ablations.{name}: {error}") from None
