"""Settings of the maze study, and what could not be studied with them."""

import dataclasses
import pathlib

from common_jax.cli.options import CheckpointOption, DeviceOption, SeedOption
from common_jax.cli.ranges import PositiveInt, check_ranges
from common_jax.errors import InputError
from reward_jax.data.trajectory.windows import HorizonOption
from reward_jax.diffusion.train import EMA
from reward_jax.planning.fit import Training
from reward_jax.planning.options import (
    DiffusionOption,
    NetworkOption,
    PlansOption,
    RewardNetOption,
    ScalesOption,
)
from reward_jax.studies.base import AmountOption, WorkersOption
from reward_jax.tasks.plane import BinsOption, MapOptions

__all__ = ["STRIDES", "Config", "check"]

# Environment steps between rows: the longest walks of a maze fit into 32 rows.
STRIDES = {"open": 10, "umaze": 10, "medium": 16, "large": 28}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    SeedOption,
    DeviceOption,
    WorkersOption,
    CheckpointOption,
    ScalesOption,
    PlansOption,
    BinsOption,
    RewardNetOption,
    NetworkOption,
    DiffusionOption,
    HorizonOption,
    AmountOption,
):
    """Extract a reward for every goal of every maze; windows have the strides of their maze.

    Args:
        out: folder of the study; what is there already is kept.
        mazes: of open, umaze, medium, large.
        goals: how many of each maze's eight.
        base: training of the bases.
        base_steps: steps of a maze's base, where they are not base.steps: long walks through
            narrow halls take longer to learn.
        expert: training of the experts, which begin as their base.
        map_windows: windows of the base's held-out data that make a heat map.
        headline_scale: the guidance scale that the summary tells of.
    """

    out: pathlib.Path = pathlib.Path("runs/maze-study")
    mazes: tuple[str, ...] = ("open", "umaze", "medium", "large")
    goals: PositiveInt = 8
    base: Training = dataclasses.field(default_factory=Training)
    base_steps: dict[str, PositiveInt] = dataclasses.field(
        default_factory=lambda: {"medium": 24000, "large": 24000}
    )
    expert: Training = dataclasses.field(
        default_factory=lambda: Training(
            steps=1500, learning_rate=5e-4, ema=EMA(decay=0.99, every=1, begin=0)
        )
    )
    map_windows: PositiveInt = MapOptions.windows
    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    headline_scale: float = 2.0


def check(config: Config) -> None:
    """InputError for what would fail after hours of training."""
    check_ranges(config)
    if config.goals > 8:
        raise InputError(f"goals is {config.goals}: give 1 to 8")
    if not config.mazes:
        raise InputError("mazes is empty: give one of " + ", ".join(STRIDES))
    for name in config.base_steps:
        if name not in STRIDES:
            raise InputError(f"base_steps: {name!r} is no maze; there are {', '.join(STRIDES)}")
    if config.headline_scale not in config.scales:
        raise InputError(f"headline_scale {config.headline_scale} is none of the scales")
    config.network.check(config.horizon)
    if config.expert.prediction != config.base.prediction:
        raise InputError("expert.prediction must be base.prediction: experts begin as their base")
    if config.matching.x_t != "mixed":
        raise InputError(
            f"matching.x_t is {config.matching.x_t}, but the study matches on walks of both "
            "models: leave it out, or set mixed"
        )
