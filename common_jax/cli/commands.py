"""The commands of a program, by name; each is imported when it is chosen."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Command", "Commands", "Group", "of_module", "of_study"]


@dataclasses.dataclass(frozen=True)
class Command:
    """help: one line. load: imports the command; returns its options class and its function.

    alone: of several processes, process 0 alone runs it.
    """

    help: str
    load: Callable[[], tuple[type, Callable[[Any], Any]]]
    alone: bool = False


def of_module(help: str, module: str, *, alone: bool = False) -> Command:
    """The command of a module, which has `Config`, its options, and `run`, which takes one."""

    def load() -> tuple[type, Callable[[Any], Any]]:
        found = importlib.import_module(module)
        return found.Config, found.run

    return Command(help, load, alone)


def of_study(help: str, load: Callable[[], Any]) -> Command:
    """The command of a study, which has `config`, the class of its options, and `run`."""

    def parts() -> tuple[type, Callable[[Any], Any]]:
        study = load()
        return study.config, study.run

    return Command(help, parts)


@dataclasses.dataclass(frozen=True)
class Group:
    """Commands under one name, `PROGRAM GROUP COMMAND`. help: one line. load: returns them."""

    help: str
    load: Callable[[], Mapping[str, Command]]


Commands = Mapping[str, Command | Group]  # in the order of --help
