"""The start of a program. Imports next to nothing, so that Ctrl-C is its own from the start."""

from collections.abc import Callable, Sequence
from typing import Any

from common_jax.cli.commands import Commands
from common_jax.cli.interrupts import guard, leave

__all__ = ["start"]


def start(
    program: str,
    about: str,
    commands: Commands,
    argv: Sequence[str] | None = None,
    *,
    every: Callable[[], Sequence[type[Any]]] = tuple,
) -> int:
    """Run one command (`command_line.run`); returns the exit code.

    argv: what follows the program's name; None in a process of the program's own, which then
    answers to SIGINT as `interrupts` says, and does not return what is no success. every: loads
    the classes of options that each command has.
    """
    own = argv is None and guard(program)
    from common_jax.cli.command_line import run  # it takes time

    code = run(program, about, commands, argv, every=every())
    if code and own:
        leave(code)  # what was broken off may have threads
    return code
