"""A hash of all that scores depend on: only a run with the same hash continues a journal."""

import hashlib
import importlib.metadata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from tuco_jax.core.checksum import weights_checksum
from tuco_jax.core.walk import Source, as_source
from tuco_jax.models.pair import Pair

__all__ = ["scores_fingerprint"]


def scores_fingerprint(
    pair: Pair | Source, tokens: Sequence[Int[np.ndarray, " n"]], norm: int
) -> str:
    """Of weights, configs, precision, prompts' tokens (n), the norm and this package's version."""
    version = importlib.metadata.version("tuco-reward-jax")
    precision = as_source(pair).ends.precision
    found = hashlib.sha256(repr((version, weights_checksum(pair), precision, norm)).encode())
    found.update(np.asarray([t.size for t in tokens], np.int64).tobytes())
    for row in tokens:
        found.update(row.tobytes())
    return found.hexdigest()
