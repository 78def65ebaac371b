"""`reward-jax plan`: memory, FLOPs and exchanges of a training on devices that are not here."""

import functools
from collections.abc import Callable
from typing import Any

from common_jax.cli.commands import Command

__all__ = ["COMMANDS"]


def _of(options: str, function: str) -> tuple[type, Callable[[Any], None]]:
    from reward_jax.planning import cost

    return getattr(cost, options), functools.partial(_run, getattr(cost, function))


def _run(plan: Callable[[Any], Any], config: Any) -> None:
    from common_jax.plan import report

    report(lambda: plan(config), config.figures)


COMMANDS = {
    "train": Command(
        "a step of training a denoiser",
        functools.partial(_of, "TrainingPlanOptions", "plan_training"),
        alone=True,
    ),
    "extract": Command(
        "a step of extracting a reward, the models asked",
        functools.partial(_of, "ExtractionPlanOptions", "plan_extraction"),
        alone=True,
    ),
}
