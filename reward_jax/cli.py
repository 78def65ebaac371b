"""The command line `reward-jax COMMAND`: its commands, each a module of `commands/`."""

import sys
from collections.abc import Mapping, Sequence

from common_jax.cli.commands import Command, Group, of_module
from common_jax.cli.program import start

__all__ = ["COMMANDS", "main"]

_ABOUT = "What does an expert want that its base does not? Rewards from two diffusion models."


def _studies() -> Mapping[str, Command]:
    from reward_jax.commands import study

    return study.COMMANDS


def _plans() -> Mapping[str, Command]:
    from reward_jax.commands import plan

    return plan.COMMANDS


def _every() -> Sequence[type]:
    from common_jax.cli.options import PrecisionOption

    return (PrecisionOption,)


_HELP = {
    "data": "record data of a task: of a base, or of an expert",
    "train": "train a diffusion model on recorded trajectories, or on images",
    "extract": "learn the reward of an expert model relative to its base",
    "heatmap": "draw where a reward is high, and its peak against the goal",
    "steer": "plan, or draw images, with the base, steered by a reward",
    "sweep": "guidance scales and stop steps, all in one compiled call",
    "report": "one HTML page of a base, an expert and their reward",
    "policy": "learn policies that record data, by reinforcement learning",
    "demo": "extract a reward from the shipped models and write a report",
}
_ALONE = ("data", "report", "policy", "demo")  # several processes would do the same work
COMMANDS = {
    **{
        name: of_module(help, f"reward_jax.commands.{name}", alone=name in _ALONE)
        for name, help in _HELP.items()
    },
    "plan": Group("what training would take on devices that are not here", _plans),
    "study": Group("repeat an experiment of the paper", _studies),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    return start("reward-jax", _ABOUT, COMMANDS, argv, every=_every)


if __name__ == "__main__":
    sys.exit(main())
