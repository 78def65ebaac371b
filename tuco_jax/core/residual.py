"""The residual stream: its beginning, and the share of FTC in what layers add to it.

Legend: B rows, T tokens, D residual width.
"""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from common_jax.mesh import constrain
from tuco_jax.core.places import Places
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair

__all__ = ["begin", "share"]


def share(
    ptc: Float[Array, "..."], ftc: Float[Array, "..."], norm: int = 1, axis: Any = -1
) -> Float[Array, "..."]:
    """|ftc| / (|ptc| + |ftc|) over `axis`, 0/0 taken as 0, and its gradient, too.

    norm: 1 or 2; raises ValueError for another.
    """
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, not {norm!r}")

    def size(x: Float[Array, "..."]) -> Float[Array, "..."]:
        if norm == 1:
            return jnp.sum(jnp.abs(x), axis=axis)
        square = jnp.sum(jnp.square(x), axis=axis)
        return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))

    p, f = size(ptc), size(ftc)
    total = p + f
    # Not `total > 0`: NaN must stay NaN.
    return jnp.where(total == 0, 0, f / jnp.where(total == 0, 1, total))


def begin(
    ends: Pair,
    tokens: Int[Array, "B T"] | None,
    embeddings: Float[Array, "B T D"] | None,
    places: Places,
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """x_0, float32: the tuned model's embedding of the tokens, or `embeddings` as they are.

    Raises ValueError unless one of the two is given.
    """
    if (tokens is None) == (embeddings is None):
        raise ValueError("give either tokens [B, T] or embeddings [B, T, D]")
    if tokens is not None:
        at = places.tuned.query
        embeddings = decoder.embed(ends.tuned_config, ends.tuned_params, tokens, at, mesh=mesh)
    assert embeddings is not None
    return constrain(embeddings.astype(jnp.float32), mesh)
