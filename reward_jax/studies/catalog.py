"""Every study by its name, with what it asks. It is of a task, and may name it. Loads fast."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_jax.studies.base import Study

__all__ = ["STUDIES", "load_study"]

STUDIES = {
    "i2p": "Stable Diffusion: the reward of safe guidance, on I2P's prompts (section 5.3)",
    "images": "images: what experts were tuned on without is judged, and steered away from",
    "locomotion": "robots: returns of every arm, steered and unsteered (section 5.2)",
    "maze": "four mazes, eight goals each: a reward and a map for every goal (section 5.1)",
}


def load_study(name: str) -> "Study[Any]":
    """The study of a name in `STUDIES`; imports its modules."""
    return importlib.import_module(f"reward_jax.studies.{name}.run").STUDY
