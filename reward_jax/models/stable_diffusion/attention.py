"""Attention between the places of an image, and from them to a text.

    form    where                                    what it holds of logits
    cudnn   GPU (CUDA, compute capability 8 or       tiles on the chip
            more), bfloat16 or float16, heads up
            to 128 wide and a multiple of 8
    parts   elsewhere                                of some queries at a time

A part has no more logits than twice the queries have numbers, or 128 rows of them: of 64 x 64
latents 80 MB in place of a gigabyte. Softmax is in float32.

Legend: B batch, Q queries, T keys, H heads, h head width.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common_jax.mesh import cudnn_width

__all__ = ["attend"]

_WHOLE = 2**20  # logits that are computed at once, whatever the queries are
_ROWS = 128
_WIDEST = 128  # head that is given to cuDNN, though recent GPUs take more


def attend(
    q: Float[Array, "B Q H h"],
    k: Float[Array, "B T H h"],
    v: Float[Array, "B T H h"],
    causal: bool = False,
) -> Float[Array, "B Q H h"]:
    """softmax(q k / sqrt(h)) v; causal: a query sees no key that comes after it."""
    width = q.shape[-1]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if half and not causal and width % 8 == 0 and width <= min(_WIDEST, cudnn_width()):
        return jax.lax.platform_dependent(q, k, v, cuda=_by_cudnn, default=_in_parts)
    return _whole(q, k, v, causal) if causal else _in_parts(q, k, v)


def _by_cudnn(
    q: Float[Array, "B Q H h"],
    k: Float[Array, "B T H h"],
    v: Float[Array, "B T H h"],
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B Q H h"]:
    """implementation: "xla" computes the same without a GPU, for tests."""
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def _whole(
    q: Float[Array, "B Q H h"],
    k: Float[Array, "B T H h"],
    v: Float[Array, "B T H h"],
    causal: bool = False,
) -> Float[Array, "B Q H h"]:
    logits = jnp.einsum("bqhc,bthc->bhqt", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if causal:
        seen = jnp.tri(q.shape[1], k.shape[1], dtype=bool)
        logits = jnp.where(seen[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqt,bthc->bqhc", weights, v)


def _in_parts(
    q: Float[Array, "B Q H h"], k: Float[Array, "B T H h"], v: Float[Array, "B T H h"]
) -> Float[Array, "B Q H h"]:
    batch, queries, heads, width = q.shape
    rows = max(_ROWS, 2 * queries * width // k.shape[1])
    if rows >= queries or batch * heads * queries * k.shape[1] <= _WHOLE:
        return _whole(q, k, v)
    parts = -(-queries // rows)
    rows = -(-queries // parts)
    padded = jnp.pad(q, ((0, 0), (0, parts * rows - queries), (0, 0), (0, 0)))
    pieces = jnp.moveaxis(padded.reshape(batch, parts, rows, heads, width), 1, 0)
    # Recomputed when differentiated, or a derivative would hold all the logits after all.
    mixed = jax.lax.map(jax.checkpoint(lambda piece: _whole(piece, k, v)), pieces)
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, -1, heads, width)[:, :queries]
