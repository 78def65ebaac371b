"""`tuco-jax study NAME`: every experiment of the paper, and the controls that it lacks."""

from collections.abc import Callable
from typing import Any

from common_jax.cli.command_line import Command
from tuco_jax.studies.catalog import STUDIES, load_study

__all__ = ["COMMANDS"]


def _command(name: str, about: str) -> Command:
    def load() -> tuple[type, Callable[[Any], Any]]:
        study = load_study(name)
        return study.config, study.run

    return Command(about, load)


COMMANDS = {name: _command(name, about) for name, about in STUDIES.items()}
