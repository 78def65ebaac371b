"""`reward-jax study NAME`: every experiment of the paper."""

import functools

from common_jax.cli.commands import of_study
from reward_jax.studies.catalog import STUDIES, load_study

__all__ = ["COMMANDS"]

COMMANDS = {
    name: of_study(about, functools.partial(load_study, name)) for name, about in STUDIES.items()
}
