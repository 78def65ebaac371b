"""Options that several commands and studies share, each stated once.

What a command has besides stands with the function that it calls. A class that needs another
default sets it, and inherits the words. Of several bases the last one's options come first, in
--help and in files: what is read stands last.
"""

import dataclasses
import pathlib
from typing import Literal

from common_jax.cli.ranges import NonNegativeInt, PositiveInt
from reward_jax.data.trajectory.windows import CutOptions, WindowSize
from reward_jax.planning.extract import Matching, RewardOptions
from reward_jax.planning.fit import NetworkOptions
from reward_jax.planning.image_options import ClassUNetOptions, HalfUNetOptions, ImageOptions
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.tasks.base import Rollout

__all__ = [
    "AnyRewardNetOption",
    "STEERED",
    "BaseOption",
    "CutOption",
    "DiffusionOption",
    "EpisodesOption",
    "FolderOption",
    "GoalOption",
    "GuidanceOption",
    "MatchingOption",
    "NetworkOption",
    "NewSpaceOptions",
    "PairOption",
    "PlansOption",
    "RewardNetOption",
    "RolloutOption",
    "ScalesOption",
    "SteeredOption",
    "StopsOption",
]

STEERED = GuidanceOptions(scale=2.0)  # where nothing is swept: the scale that served best


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutOption:
    """How episodes are read.

    Args:
        env: the task that they are of, by name or by its Gymnasium id, where they do not say (as
            D4RL's files do not).
        cut: how the file is divided into episodes, and episodes into windows.
    """

    env: str | None = None
    cut: CutOptions = dataclasses.field(default_factory=CutOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodesOption(CutOption):
    """Data that are read.

    Args:
        data: episodes (for a map, the base's): a file of `reward-jax data`, D4RL's HDF5, or a
            Minari data set; or images, where a model is of them: a folder of PNG and JPEG, one
            with a folder for each class, or IDX files.
    """

    data: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseOption:
    """The base.

    Args:
        base: the base's denoiser, a file or a run of `reward-jax train`.
    """

    base: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOption(BaseOption):
    """The base and its expert.

    Args:
        expert: the expert's denoiser, likewise.
    """

    expert: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderOption:
    """Where findings go.

    Args:
        out: folder of what is written.
    """

    out: pathlib.Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoalOption:
    """What findings are held against.

    Args:
        goal: what peaks and outcomes are measured against, such as [x, y]; by default the
            expert's goal.
    """

    goal: str | tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlansOption:
    """How many plans.

    Args:
        plans: how many are made, from starts that the task draws; or how many images.
    """

    plans: PositiveInt = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceOption(PlansOption):
    """How plans are made.

    Args:
        guidance: how plans are drawn and steered.
    """

    guidance: GuidanceOptions = dataclasses.field(default_factory=GuidanceOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOption:
    """How plans are acted on.

    Args:
        rollout: in a world that is planned in again and again.
    """

    rollout: Rollout = dataclasses.field(default_factory=Rollout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteeredOption(GuidanceOption):
    """The same where nothing is swept."""

    guidance: GuidanceOptions = STEERED


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalesOption:
    """What is tried.

    Args:
        scales: guidance scales, each of which is tried.
    """

    scales: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopsOption:
    """Until when samples are steered.

    Args:
        t_stopgrads: diffusion steps below which there is no guidance, each of which is tried.
    """

    t_stopgrads: tuple[NonNegativeInt, ...] = (0, 2, 5, 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOption:
    """What is trained.

    Args:
        network: of the denoiser of trajectories.
    """

    network: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionOption:
    """The diffusion process.

    Args:
        diffusion_steps: T.
    """

    diffusion_steps: PositiveInt = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchingOption:
    """How a reward is extracted.

    Args:
        matching: how the reward is trained.
    """

    matching: Matching = dataclasses.field(default_factory=Matching)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardNetOption(MatchingOption):
    """What reward of trajectories is extracted.

    Args:
        reward: the reward's network, of trajectories.
    """

    reward: RewardOptions = dataclasses.field(default_factory=RewardOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyRewardNetOption(RewardNetOption):
    """What reward is extracted: of trajectories, or of images.

    Args:
        half_unet_2d: the reward's network, of images.
    """

    half_unet_2d: HalfUNetOptions = dataclasses.field(default_factory=HalfUNetOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewSpaceOptions(NetworkOption, WindowSize, EpisodesOption):
    """Data, and of what a model is that begins from nothing: trajectories, or images.

    Args:
        actions: keep the actions in the trajectories.
        normaliser: of trajectories: limits (to -1 .. 1) or gaussian.
        images: how images are read.
        unet_2d: the denoiser's network, of images.
    """

    actions: bool = False
    normaliser: Literal["limits", "gaussian"] = "limits"
    images: ImageOptions = dataclasses.field(default_factory=ImageOptions)
    unet_2d: ClassUNetOptions = dataclasses.field(default_factory=ClassUNetOptions)
