"""TuCo in JAX: what did fine-tuning change? See `score`, `tuco`, `decompose` and `generate`.

Importing this package imports nothing else: a name is loaded when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuco_jax.core.decompose import decompose
    from tuco_jax.core.last_token import tuco
    from tuco_jax.core.streamed import stream_pair
    from tuco_jax.core.trajectories import output_co, trajectories
    from tuco_jax.generation.generate import generate
    from tuco_jax.gradients.attribution import attribute, attribute_prompts, write_attribution
    from tuco_jax.gradients.layer_alpha import (
        Choices,
        LayerAlphaOptions,
        cross_validate_layer_alpha,
        fit_layer_alpha,
    )
    from tuco_jax.gradients.soft_prompt import (
        SoftPromptOptions,
        Tokens,
        fit_soft_prompt,
        soft_prompt_tuco,
    )
    from tuco_jax.prompts.read import Prompt, read_prompts
    from tuco_jax.scoring.score import Scores, score
    from tuco_jax.weights.load import load_pair

__all__ = [
    "Choices",
    "LayerAlphaOptions",
    "Prompt",
    "Scores",
    "SoftPromptOptions",
    "Tokens",
    "attribute",
    "attribute_prompts",
    "cross_validate_layer_alpha",
    "decompose",
    "fit_layer_alpha",
    "fit_soft_prompt",
    "generate",
    "load_pair",
    "output_co",
    "read_prompts",
    "score",
    "soft_prompt_tuco",
    "stream_pair",
    "trajectories",
    "tuco",
    "write_attribution",
]

_HOMES = {
    "Choices": "tuco_jax.gradients.layer_alpha",
    "LayerAlphaOptions": "tuco_jax.gradients.layer_alpha",
    "Prompt": "tuco_jax.prompts.read",
    "Scores": "tuco_jax.scoring.score",
    "SoftPromptOptions": "tuco_jax.gradients.soft_prompt",
    "Tokens": "tuco_jax.gradients.soft_prompt",
    "attribute": "tuco_jax.gradients.attribution",
    "attribute_prompts": "tuco_jax.gradients.attribution",
    "cross_validate_layer_alpha": "tuco_jax.gradients.layer_alpha",
    "decompose": "tuco_jax.core.decompose",
    "fit_layer_alpha": "tuco_jax.gradients.layer_alpha",
    "fit_soft_prompt": "tuco_jax.gradients.soft_prompt",
    "generate": "tuco_jax.generation.generate",
    "load_pair": "tuco_jax.weights.load",
    "output_co": "tuco_jax.core.trajectories",
    "read_prompts": "tuco_jax.prompts.read",
    "score": "tuco_jax.scoring.score",
    "soft_prompt_tuco": "tuco_jax.gradients.soft_prompt",
    "stream_pair": "tuco_jax.core.streamed",
    "trajectories": "tuco_jax.core.trajectories",
    "tuco": "tuco_jax.core.last_token",
    "write_attribution": "tuco_jax.gradients.attribution",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
