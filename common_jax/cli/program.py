"""The start of a program. Imports next to nothing, so that Ctrl-C is its own from the start."""

from collections.abc import Sequence

from common_jax.cli.commands import Commands
from common_jax.cli.interrupts import guard

__all__ = ["start"]


def start(program: str, about: str, commands: Commands, argv: Sequence[str] | None = None) -> int:
    """Run one command (`command_line.run`); returns the exit code.

    argv: what follows the program's name; None in a process of the program's own, which then
    answers to SIGINT as `interrupts` says.
    """
    if argv is None:
        guard(program)
    from common_jax.cli.command_line import run  # it takes time

    return run(program, about, commands, argv)
