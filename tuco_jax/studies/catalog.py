"""`tuco-jax study NAME`: every experiment of the paper, and the controls that it lacks."""

import importlib
from collections.abc import Callable
from typing import Any

from common_jax.cli.command_line import Command

__all__ = ["STUDIES"]


def _study(about: str, module: str) -> Command:
    """A study's module has `Config`, its options, and `run`, which takes them."""

    def load() -> tuple[type, Callable[[Any], Any]]:
        found = importlib.import_module(f"tuco_jax.studies.{module}")
        return found.Config, found.run

    return Command(about, load)


STUDIES = {
    "alpha-mmlu": _study("multiple choice under FTC_alpha (section 5.1)", "alpha_mmlu"),
    "alpha-mwe": _study("model-written behaviours under FTC_alpha (section 5.1)", "alpha_mwe"),
    "web-chat": _study("web text against chat (section 5.2)", "web_chat"),
    "gcg": _study("greedy coordinate gradient attacks (section 5.3)", "gcg"),
    "conjugate": _study("harmful requests by language (section 5.3)", "conjugate"),
    "many-shot": _study("many-shot jailbreaks and their controls (section 5.3)", "many_shot"),
    "broken": _study("attacks that succeed and that fail (section 5.4)", "broken"),
    "output-co": _study("TuCo against OutputCo (section 5.5)", "output_co"),
    "floors": _study("noise floors of TuCo, and simpler scores beside it", "floors"),
}
