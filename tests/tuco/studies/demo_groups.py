"""Groups of prompts for the demo, a pair for them, and scores to compare with."""

import pathlib

import jax
import numpy as np

from tests.tuco.tiny import save_tiny
from tuco_jax.core.decompose import decompose
from tuco_jax.core.residual import share
from tuco_jax.datasets.prompt_groups import PromptGroup

TEXTS = ["hello", "a b c", "one & two", "na\u00efve \u2603", "tea?", "<script>"]


def save_models(folder: pathlib.Path) -> tuple[str, str]:
    save_tiny(folder / "base", "llama", 0, max_position_embeddings=128)
    save_tiny(folder / "tuned", "llama", 1, max_position_embeddings=128)
    return str(folder / "base"), str(folder / "tuned")


def made_groups() -> list[PromptGroup]:
    names = ["x", "x", "y", "y", "z", "z"]
    inside = [f"do: {t}" for t in TEXTS]
    return [
        PromptGroup("chat", "Chat.", TEXTS, True),
        PromptGroup("plain text", "Plain.", TEXTS, False),
        PromptGroup("harmful", "Harm.", [t + "!" for t in TEXTS], True),
        PromptGroup("jailbreak", "Attack.", inside, True, names),
    ]


@jax.jit
def _shares(pair, tokens, mask):
    out = decompose(pair, tokens, mask)
    return share(out.ptc, out.ftc)


def shares(pair, ids: np.ndarray) -> np.ndarray:
    """TuCo of each token, from the full form on one row, padded to one shape."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : ids.size] = ids
    return np.asarray(_shares(pair, tokens, np.arange(64)[None] < ids.size))[0, : ids.size]
