"""A hash of all that results depend on: only a run with the same hash continues a journal."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from tuco_jax.core.checksum import weights_checksum
from tuco_jax.core.walk import Source, as_source
from tuco_jax.models.pair import Pair

__all__ = ["run_fingerprint", "scores_fingerprint"]


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

    more: what has a text that is one and the same in every process.
    """
    version = importlib.metadata.version("tuco-reward-jax")
    found = hashlib.sha256(repr((version, weights, precision, *more)).encode())
    found.update(np.asarray([t.size for t in tokens], np.int64).tobytes())
    for row in tokens:
        found.update(row.tobytes())
    return found.hexdigest()
