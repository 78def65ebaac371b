"""The command line `tuco-jax COMMAND`: its commands, each a module of `tuco_jax/commands`."""

import os
import sys
from collections.abc import Mapping, Sequence

from common_jax.cli.commands import Command, Group, of_module
from common_jax.cli.program import start
from common_jax.hidden import hidden

__all__ = ["COMMANDS", "main"]

_ABOUT = "What did fine-tuning change? TuCo of a language model, prompt by prompt."


def _studies() -> Mapping[str, Command]:
    from tuco_jax.commands import study

    return study.COMMANDS


COMMANDS = {
    "score": of_module(
        "score a file of prompts: how much does tuning contribute to each answer?",
        "tuco_jax.commands.score",
    ),
    "generate": of_module(
        "answer prompts with tuning's contribution scaled, each token beside its TuCo",
        "tuco_jax.commands.generate",
    ),
    "import": of_module(
        "write a model, or a base and its adapter, into a store that loads fast",
        "tuco_jax.commands.import_",
    ),
    "finetune": of_module(
        "make a tuned model, LoRA or full, and watch TuCo while it trains",
        "tuco_jax.commands.finetune",
    ),
    "plan": of_module(
        "what scoring a pair would take on devices that are not here",
        "tuco_jax.commands.plan",
        alone=True,
    ),
    "demo": of_module(
        "score a real pair on five kinds of prompts and write an HTML report",
        "tuco_jax.commands.demo",
        alone=True,
    ),
    "study": Group("repeat an experiment of the paper on any pair", _studies),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 when interrupted.

    A process of its own imports no torch, as transformers would: seconds, for nothing here.
    """
    if argv is not None:
        return start("tuco-jax", _ABOUT, COMMANDS, argv)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # of what needs torch
    with hidden("torch"):
        return start("tuco-jax", _ABOUT, COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
