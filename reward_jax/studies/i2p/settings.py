"""Settings of the I2P study, and what could not be studied with them."""

import dataclasses
import pathlib

from common_jax import resume
from common_jax.cli.options import CheckpointOption, DeviceOption, SeedOption
from common_jax.cli.ranges import NonNegativeInt, PositiveInt, UnitInterval, check_ranges
from common_jax.errors import InputError
from reward_jax.models.stable_diffusion.safety import SafeGuidance, Strength, as_safety
from reward_jax.models.stable_diffusion.schedulers import plan
from reward_jax.studies.base import WorkersOption
from reward_jax.studies.i2p.pairs import ChainOptions
from reward_jax.studies.i2p.prompts import (
    PROMPTS,
    SplitOptions,
    prompts_checksum,
    read_prompts,
    split_prompts,
)
from reward_jax.studies.i2p.reward import LatentNetwork, PairMatching
from reward_jax.studies.i2p.store import Half
from reward_jax.torch_import.stable_diffusion import Dtype, check_stable_diffusion

__all__ = ["Config", "StoreOptions", "check"]


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """How pairs are kept.

    Args:
        at_once: rows of a shard, whose chains are drawn at once.
        dtype: of stored latents and epsilons.
    """

    at_once: PositiveInt = 16
    dtype: Half = "float16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    SeedOption,
    DeviceOption,
    WorkersOption,
    CheckpointOption,
):
    """Extract the reward of safe guidance from chains of prompts, and tell safe from unsafe by it.

    Args:
        base: a diffusers folder of Stable Diffusion 1.x.
        prompts: a csv file in I2P's layout; its column `prompt` is needed.
        out: folder of the study; what is there already is kept.
        safety: strength of the safe guidance: weak, medium, strong or max.
        momentum: of the safe guidance, in place of the strength's own; 0 makes it a function of
            x_t and t.
        most: prompts that are used, the first of the file; 0 for all.
        noises: chains of each prompt, each from a noise of its own.
        chains: how chains are drawn.
        store: how their pairs are kept.
        split: which prompts are for what.
        network: of the reward.
        matching: how the reward is matched to pairs.
        compared: rows on which eps_safe along the path is held against the exact function.
        shown: images of the report, of the highest rewards and of the lowest; 0 for none.
        dtype: of the model's weights and networks.
    """

    base: pathlib.Path
    prompts: pathlib.Path
    out: pathlib.Path = pathlib.Path("runs/i2p-study")
    safety: Strength = "max"
    momentum: UnitInterval | None = None
    most: NonNegativeInt = 0
    noises: PositiveInt = 1
    chains: ChainOptions = dataclasses.field(default_factory=ChainOptions)
    store: StoreOptions = dataclasses.field(default_factory=StoreOptions)
    split: SplitOptions = dataclasses.field(default_factory=SplitOptions)
    network: LatentNetwork = dataclasses.field(default_factory=LatentNetwork)
    matching: PairMatching = dataclasses.field(default_factory=PairMatching)
    compared: PositiveInt = 4
    shown: NonNegativeInt = 4
    dtype: Dtype = "float32"

    def guidance(self) -> SafeGuidance:
        """The safe guidance."""
        found = as_safety(self.safety)
        assert found is not None
        if self.momentum is None:
            return found
        return dataclasses.replace(found, momentum=self.momentum)


def check(config: Config) -> None:
    """InputError for what would fail after hours of sampling."""
    check_ranges(config)
    c = config
    if c.chains.guidance_scale <= 1:
        raise InputError(
            f"chains.guidance_scale is {c.chains.guidance_scale:g}: give more than 1, as safe "
            "guidance needs"
        )
    if c.guidance().warmup >= c.chains.steps:
        raise InputError(
            f"chains.steps is {c.chains.steps}, where the {c.safety} guidance begins after "
            f"{c.guidance().warmup} steps: give more steps, or another strength"
        )
    if not c.network.multipliers or any(
        c.network.dim * m % c.network.groups for m in (1, *c.network.multipliers)
    ):
        raise InputError(
            f"network.groups {c.network.groups} must divide network.dim {c.network.dim} times "
            "each of network.multipliers, of which there is one or more"
        )
    prompts = read_prompts(c.prompts, c.most)
    split_prompts(prompts, c.split, c.seed)
    resume.check(c.out / "pairs", {PROMPTS: prompts_checksum(prompts)})
    scheduler = check_stable_diffusion(c.base).scheduler
    try:
        plan(scheduler, c.chains.scheduler, c.chains.steps)
    except InputError as error:
        raise InputError(f"chains: {error}") from None
