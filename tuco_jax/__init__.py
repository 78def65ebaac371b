"""TuCo in JAX: what did fine-tuning change? See `score`, `tuco`, `decompose` and `generate`.

Importing this package imports nothing else: a name is loaded when it is first asked for.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuco_jax.decompose import decompose, tuco
    from tuco_jax.prompts import Prompt, read_prompts
    from tuco_jax.score import Scores, score
    from tuco_jax.steer import generate
    from tuco_jax.trajectories import output_co, trajectories
    from tuco_jax.weights.load import load_pair

__all__ = [
    "Prompt",
    "Scores",
    "decompose",
    "generate",
    "load_pair",
    "output_co",
    "read_prompts",
    "score",
    "trajectories",
    "tuco",
]

_HOMES = {
    "Prompt": "tuco_jax.prompts",
    "Scores": "tuco_jax.score",
    "decompose": "tuco_jax.decompose",
    "generate": "tuco_jax.steer",
    "load_pair": "tuco_jax.weights.load",
    "output_co": "tuco_jax.trajectories",
    "read_prompts": "tuco_jax.prompts",
    "score": "tuco_jax.score",
    "trajectories": "tuco_jax.trajectories",
    "tuco": "tuco_jax.decompose",
}


class _Package(types.ModuleType):
    """`tuco_jax.score` is the function, though a module of that name exists.

    Python binds a submodule to its name in the package when it is first imported; for names of
    the public interface that is undone here. `from tuco_jax.score import ...` works as ever.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
