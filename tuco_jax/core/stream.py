"""The residual stream: where it begins, and the share of FTC in what is added to it.

Legend: B rows, T tokens, D residual width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tuco_jax.core.places import Places
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import constrain

__all__ = ["begin", "share"]


def share(ptc: jax.Array, ftc: jax.Array, norm: int = 1, axis: Any = -1) -> jax.Array:
    """|ftc| / (|ptc| + |ftc|) over `axis`, 0/0 taken as 0 (its gradient, too)."""
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, not {norm!r}")

    def size(x: jax.Array) -> jax.Array:
        if norm == 1:
            return jnp.sum(jnp.abs(x), axis=axis)
        square = jnp.sum(jnp.square(x), axis=axis)
        return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))

    p, f = size(ptc), size(ftc)
    total = p + f
    # Not `total > 0`: a norm that is not a number must stay one.
    return jnp.where(total == 0, 0, f / jnp.where(total == 0, 1, total))


def begin(
    ends: Pair,
    tokens: jax.Array | None,
    embeddings: jax.Array | None,
    places: Places,
    mesh: Mesh | None = None,
) -> jax.Array:
    """x_0 [B, T, D] float32: the tuned model's embedding of tokens [B, T], or what is given."""
    if (tokens is None) == (embeddings is None):
        raise ValueError("give either tokens [B, T] or embeddings [B, T, D]")
    if tokens is not None:
        at = places.tuned.query
        embeddings = decoder.embed(ends.tuned_config, ends.tuned_params, tokens, at)
    assert embeddings is not None
    return constrain(embeddings.astype(jnp.float32), mesh)
