"""`reward-jax plan`: memory, FLOPs and exchanges of a training on devices that are not here."""

import functools
from collections.abc import Callable
from typing import Any

from common_jax.cli.commands import Command

__all__ = ["COMMANDS"]


def _training() -> tuple[type, Callable[[Any], None]]:
    from reward_jax.planning.cost import TrainingPlanOptions, plan_training

    return TrainingPlanOptions, functools.partial(_run, plan_training)


def _extraction() -> tuple[type, Callable[[Any], None]]:
    from reward_jax.planning.cost import ExtractionPlanOptions, plan_extraction

    return ExtractionPlanOptions, functools.partial(_run, plan_extraction)


def _chains() -> tuple[type, Callable[[Any], None]]:
    from reward_jax.planning.chain_cost import ChainPlanOptions, plan_chains

    return ChainPlanOptions, functools.partial(_run, plan_chains)


def _run(plan: Callable[[Any], Any], config: Any) -> None:
    from common_jax.plan import report

    report(lambda: plan(config), config.figures)


COMMANDS = {
    "train": Command("a step of training a denoiser", _training, alone=True),
    "extract": Command("a step of extracting a reward, the models asked", _extraction, alone=True),
    "chains": Command("chains of Stable Diffusion 1.x, safely guided", _chains, alone=True),
}
