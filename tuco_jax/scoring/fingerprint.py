"""Hashes of what results depend on: only where they are the same is a journal continued."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from tuco_jax.core.checksum import weights_checksum
from tuco_jax.core.walk import Source, as_source
from tuco_jax.models.pair import Pair

__all__ = ["run_fingerprint", "scores_fingerprint", "tokens_fingerprint"]


def scores_fingerprint(
    pair: Pair | Source, tokens: Sequence[Int[np.ndarray, " n"]], norm: int
) -> str:
    """Of weights, configs, precision, prompts' tokens (n), the norm and this package's version."""
    precision = as_source(pair).ends.precision
    return run_fingerprint(weights_checksum(pair), precision, tokens, norm)


def run_fingerprint(
    weights: str, precision: str, tokens: Sequence[Int[np.ndarray, " n"]], *more: Any
) -> str:
    """Of a checksum of weights and configs, precision, prompts' tokens (n) and this version.

    more: as of `tokens_fingerprint`.
    """
    version = importlib.metadata.version("tuco-reward-jax")
    return tokens_fingerprint(tokens, version, weights, precision, *more)


def tokens_fingerprint(tokens: Sequence[Int[np.ndarray, " n"]], *more: Any) -> str:
    """Of prompts' tokens (n), and of what is computed of them.

    more: what has a text that is whole, and one and the same in every process: no array.
    """
    found = hashlib.sha256(repr(more).encode())
    found.update(np.asarray([t.size for t in tokens], np.int64).tobytes())
    for row in tokens:
        found.update(row.tobytes())
    return found.hexdigest()
