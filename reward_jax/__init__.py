"""Relative rewards in JAX: what does an expert diffusion model want that its base does not?

See `extract_reward`, `score_from`, `guided_sample`. Importing this package imports nothing else: a
name is loaded when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_jax.diffusion.denoiser import ClassifierFree, score_from
    from reward_jax.diffusion.loop import LoopOptions
    from reward_jax.diffusion.process import FirstState, Pinned, first_state
    from reward_jax.diffusion.samplers import DDIM, Ancestral, Sampler
    from reward_jax.diffusion.schedule import cosine_schedule, linear_schedule
    from reward_jax.diffusion.sources import Mixed, Rows
    from reward_jax.diffusion.train import EMA, TrainingOptions, init_state, train_denoiser
    from reward_jax.models.energy import energy_of
    from reward_jax.models.stable_diffusion.pair import pair_scores, pair_texts
    from reward_jax.models.stable_diffusion.safety import SafeGuidance
    from reward_jax.reward.capped import CappedReward, cap_reward
    from reward_jax.reward.diagnostics import (
        antisymmetric_part,
        explained_fraction,
        explained_of,
        seed_agreement,
    )
    from reward_jax.reward.discriminator import DiscriminatorGuide, train_discriminator
    from reward_jax.reward.extract import extract_reward, init_params
    from reward_jax.reward.gradients import Guide, ScoreDifference, SteeredScore, ValueGuide
    from reward_jax.reward.guide import GuidanceOptions, guided_sample, sweep
    from reward_jax.reward.paths import draw_path_targets, join_targets
    from reward_jax.reward.relative import RelativeReward, SeedBlocks
    from reward_jax.reward.targets import ExtractionOptions, draw_targets
    from reward_jax.torch_import.lora import load_expert
    from reward_jax.torch_import.stable_diffusion import load_stable_diffusion

_HOMES = {
    "diffusion.denoiser": ("ClassifierFree", "score_from"),
    "diffusion.loop": ("LoopOptions",),
    "diffusion.process": ("FirstState", "Pinned", "first_state"),
    "diffusion.samplers": ("DDIM", "Ancestral", "Sampler"),
    "diffusion.schedule": ("cosine_schedule", "linear_schedule"),
    "diffusion.sources": ("Mixed", "Rows"),
    "diffusion.train": ("EMA", "TrainingOptions", "init_state", "train_denoiser"),
    "models.energy": ("energy_of",),
    "models.stable_diffusion.pair": ("pair_scores", "pair_texts"),
    "models.stable_diffusion.safety": ("SafeGuidance",),
    "reward.capped": ("CappedReward", "cap_reward"),
    "reward.diagnostics": (
        "antisymmetric_part",
        "explained_fraction",
        "explained_of",
        "seed_agreement",
    ),
    "reward.discriminator": ("DiscriminatorGuide", "train_discriminator"),
    "reward.extract": ("extract_reward", "init_params"),
    "reward.gradients": ("Guide", "ScoreDifference", "SteeredScore", "ValueGuide"),
    "reward.guide": ("GuidanceOptions", "guided_sample", "sweep"),
    "reward.paths": ("draw_path_targets", "join_targets"),
    "reward.relative": ("RelativeReward", "SeedBlocks"),
    "reward.targets": ("ExtractionOptions", "draw_targets"),
    "torch_import.lora": ("load_expert",),
    "torch_import.stable_diffusion": ("load_stable_diffusion",),
}

__all__ = [
    "Ancestral",
    "CappedReward",
    "ClassifierFree",
    "DDIM",
    "DiscriminatorGuide",
    "EMA",
    "ExtractionOptions",
    "FirstState",
    "GuidanceOptions",
    "Guide",
    "LoopOptions",
    "Mixed",
    "Pinned",
    "RelativeReward",
    "Rows",
    "SafeGuidance",
    "Sampler",
    "ScoreDifference",
    "SteeredScore",
    "SeedBlocks",
    "TrainingOptions",
    "ValueGuide",
    "antisymmetric_part",
    "cap_reward",
    "cosine_schedule",
    "draw_path_targets",
    "draw_targets",
    "energy_of",
    "explained_fraction",
    "explained_of",
    "extract_reward",
    "first_state",
    "guided_sample",
    "init_params",
    "init_state",
    "join_targets",
    "linear_schedule",
    "load_expert",
    "load_stable_diffusion",
    "pair_scores",
    "pair_texts",
    "score_from",
    "seed_agreement",
    "sweep",
    "train_denoiser",
    "train_discriminator",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"reward_jax.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
