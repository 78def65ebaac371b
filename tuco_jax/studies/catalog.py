"""Every study by its name, with what it asks; its module is named alike. Loads fast."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuco_jax.studies.base import Study

__all__ = ["STUDIES", "load_study"]

STUDIES = {  # in the paper's order
    "alpha-mmlu": "multiple choice under FTC_alpha (section 5.1)",
    "alpha-mwe": "model-written behaviours under FTC_alpha (section 5.1)",
    "web-chat": "web text against chat (section 5.2)",
    "gcg": "greedy coordinate gradient attacks (section 5.3)",
    "conjugate": "harmful requests by language (section 5.3)",
    "many-shot": "many-shot jailbreaks and their controls (section 5.3)",
    "broken": "attacks that succeed and that fail (section 5.4)",
    "output-co": "TuCo against OutputCo (section 5.5)",
    "floors": "noise floors of TuCo, and simpler scores beside it",
}


def load_study(name: str) -> "Study[Any, Any, Any]":
    """The study of a name in `STUDIES`; imports its module."""
    return importlib.import_module(f"tuco_jax.studies.{name.replace('-', '_')}").STUDY
