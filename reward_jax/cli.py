"""The command line `reward-jax COMMAND`: its commands, each a module of `commands/`."""

import sys
from collections.abc import Sequence

from common_jax.cli.command_line import of_module, run
from reward_jax.studies.catalog import STUDIES

__all__ = ["COMMANDS", "main"]

_ABOUT = "What does an expert want that its base does not? Rewards from two diffusion models."
_HELP = {
    "data": "record data of a task: of a base, or of an expert",
    "train": "train a diffusion model on recorded trajectories",
    "extract": "learn the reward of an expert model relative to its base",
    "heatmap": "draw where a reward is high, and its peak against the goal",
    "steer": "plan with the base, steered by a reward, and execute",
    "sweep": "guidance scales and stop steps, all in one compiled call",
    "report": "one HTML page of a base, an expert and their reward",
    "demo": "extract a reward from the shipped models and write a report",
}
COMMANDS = {
    **{name: of_module(help, f"reward_jax.commands.{name}") for name, help in _HELP.items()},
    **STUDIES,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    return run("reward-jax", _ABOUT, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
