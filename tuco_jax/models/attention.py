"""Softmax attention by backend, in one place: which form is used where, and the two written here.

Legend: B batch, T tokens (keys), Q query tokens, H query heads, K key/value heads, G = H / K,
h head width.

    form    where             what it asks                                what it holds in memory
    parts   CPU               nothing                                     B H Q T logits, by parts
    splash  TPU               rows that attend to themselves              tiles on the chip
    cudnn   GPU (CUDA)        the same in bfloat16 or float16, no cap,    tiles on the chip
                              no segments, a head width cuDNN takes
    chunks  elsewhere, and    nothing                                     B H 512 512 logits
            what these refuse

The form is chosen by the platform that a program is lowered for, so that a process without a TPU
can lower for one. cuDNN is chosen only in a process that has a GPU: JAX must find the library when
it traces. Rows of up to 512 tokens fit one chunk and need no kernel.

Whatever the form, float32 weights mean float32: splash is traced with products of the highest
precision (float32 contractions in Mosaic), chunks and parts ask XLA for the same, and cuDNN, which
cannot, never sees float32. All forms are differentiable in every mode: kernels give the numbers of
the forward pass and chunks their derivatives, which hold no B H T T array either.

At padding every form gives finite numbers, but not the same ones: nothing reads them.
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from common_jax.mesh import cudnn_width
from tuco_jax.models.attention_kernels import cudnn, splash
from tuco_jax.models.numerics import matmul, softcap
from tuco_jax.models.positions import EVERY, Positions

__all__ = ["attend", "kernels"]

_MASKED = -1e30  # finite, so that a query which sees no key yields finite numbers
_SIZE = 512  # queries and keys of one chunk


def attend(
    q: Float[Array, "B Q H h"],
    keys: Float[Array, "B K T h"],
    values: Float[Array, "B K T h"],
    query: Positions,
    key: Positions,
    window: Int[Array, ""],
    windows: tuple[int, ...],
    cap: float = 0.0,
) -> Float[Array, "B Q H h"]:
    """Attention's output softmax(cap(q k)) v over the keys that each query sees, float32.

    Args:
        q: queries, float32, already scaled.
        keys: query head i goes with key/value head i // G.
        values: of the same heads as `keys`.
        query: where the queries stand, [B, Q].
        key: where the keys stand, [B, T]; `query` itself, the same object, where rows attend to
            themselves: only then can columns be left out that no query sees, and kernels be used.
        window: how many tokens back a query sees, itself included; 0: all.
        windows: the values that `window` may have; kernels are made for each.
        cap: logits are squashed into (-cap, cap); 0: they are not.
    """
    rows, queries, heads, width = q.shape
    shared = keys.shape[1]
    # Heads first and the heads of a group in one matrix: XLA on CPU runs these products three
    # times as fast as one einsum over all five axes.
    q = q.reshape(rows, queries, shared, heads // shared, width).transpose(0, 2, 3, 1, 4)
    own = query is key
    if key.index.shape[1] != keys.shape[2]:  # some forms would read past either, or cut it off
        raise ValueError(f"{keys.shape[2]} keys stand at {key.index.shape[1]} positions")
    query, key = (dataclasses.replace(at, cos=None, sin=None) for at in (query, key))
    # Masks must not be known before q is: the derivative of a scan over layers works out once,
    # outside of it, what its body takes from positions alone, and holds the whole square of it.
    first = jax.lax.stop_gradient(q[:1, :1, :1, :1, :1])
    _, query, key, window = jax.lax.optimization_barrier((first, query, key, window))

    def form(run: Any, *options: Any) -> Any:
        # Each form is recomputed when differentiated: what one would save for its derivative,
        # every other would have to hold, as zeros, on its own platform.
        @jax.checkpoint
        def whole(q, keys, values, query, key, window):
            at = (query, query) if own else (query, key)
            return run(*options, q, keys, values, *at, window)

        return whole

    forms = {"cpu": form(_in_parts, cap), "default": form(_in_chunks, cap)}
    for platform, kernel in kernels(
        own=own,
        tokens=queries,
        width=width,
        dtype=keys.dtype,
        segments=key.segments is not None,
        cap=cap,
    ).items():
        run = {"splash": splash, "cudnn": cudnn}[kernel]
        forms[platform] = form(_by_kernel, run, windows, cap)
    mixed = jax.lax.platform_dependent(q, keys, values, query, key, window, **forms)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, width)


def kernels(
    *, own: bool, tokens: int, width: int, dtype: Any, segments: bool, cap: float
) -> dict[str, Literal["splash", "cudnn"]]:
    """Which kernel each platform has for such rows; platforms that are not named use chunks.

    own: rows attend to themselves. tokens: T. width: h. dtype: that of the weights. segments:
    whether rows hold several prompts. cap: as in `attend`.
    """
    found: dict[str, Literal["splash", "cudnn"]] = {}
    if not own or tokens <= _SIZE:
        return found
    if dtype in (jnp.float32, jnp.bfloat16):
        found["tpu"] = "splash"
    half = dtype in (jnp.bfloat16, jnp.float16)
    if half and not cap and not segments and width % 8 == 0 and width <= cudnn_width():
        found["cuda"] = "cudnn"
    return found


def _in_parts(
    cap: float,
    q: Float[Array, "B K G Q h"],
    keys: Float[Array, "B K T h"],
    values: Float[Array, "B K T h"],
    query: Positions,
    key: Positions,
    window: Int[Array, ""],
) -> Float[Array, "B K G Q h"]:
    """The CPU's form: all logits of one part of the queries at once."""
    rows, shared, group, queries, width = q.shape
    # Added rather than selected: the same number, and XLA on CPU fuses attention into one.
    hidden = _hidden(query, key, window)[:, None, None]
    parts = []
    for start, stop, seen in _query_parts(query is key, queries, keys.shape[2]):
        part = q[:, :, :, start:stop].reshape(rows, shared, -1, width)
        logits = matmul(part, keys[:, :, :seen].swapaxes(2, 3))
        logits = logits.reshape(rows, shared, group, stop - start, seen)
        logits = softcap(logits, cap) + hidden[..., start:stop, :seen]
        # Softmax, divided by its sum after the product: there are fewer numbers there.
        most = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - most)
        mixed = matmul(weights.reshape(rows, shared, -1, seen), values[:, :, :seen])
        mixed = mixed.reshape(rows, shared, group, stop - start, width)
        parts.append(mixed / jnp.sum(weights, axis=-1, keepdims=True))
    return jnp.concatenate(parts, axis=3)


def _query_parts(own: bool, queries: int, keys: int) -> list[tuple[int, int, int]]:
    """(start, stop, keys that any of these queries can see): queries that are computed together.

    Where a row attends to itself no token sees a later column, so that its first half needs no
    more than the first half of the keys. Short rows gain nothing by it, and programs grow.
    """
    count = 1 if queries < 96 else min(8, queries // 24)
    if not own or count == 1:
        return [(0, queries, keys)]
    bounds = [queries * i // count for i in range(count + 1)]
    return [(start, stop, stop) for start, stop in itertools.pairwise(bounds)]


def _visible(query: Positions, key: Positions, window: Int[Array, ""]) -> Bool[Array, "B Q T"]:
    """Which keys each query attends to."""
    distance = query.index[:, :, None] - key.index[:, None, :]
    visible = (distance >= 0) & key.mask[:, None, :]
    visible &= (window == 0) | (distance < window)
    if query.segments is not None and key.segments is not None:
        seen = query.segments[:, :, None] == key.segments[:, None, :]
        if query.start is not None:
            before = key.index[:, None, :] < query.start[:, :, None]
            seen |= before & (key.segments == EVERY)[:, None, :]
        visible &= seen
    return visible


def _hidden(query: Positions, key: Positions, window: jax.Array) -> jax.Array:
    """What is added to logits, [B, Q, T] float32: 0 where a query attends to a key, else -1e30.

    Reckoned rather than selected: a selection would begin with two constants of this shape.
    """
    return (1 - _visible(query, key, window).astype(jnp.float32)) * _MASKED


def _in_chunks(
    cap: float,
    q: Float[Array, "B K G Q h"],
    keys: Float[Array, "B K T h"],
    values: Float[Array, "B K T h"],
    query: Positions,
    key: Positions,
    window: Int[Array, ""],
    size: int = _SIZE,
) -> Float[Array, "B K G Q h"]:
    """The fallback: `size` queries by `size` keys at a time.

    The softmax over keys is corrected chunk by chunk (Milakov and Gimelshein, arXiv 1805.02867;
    Rabe and Staats, arXiv 2112.05682). Chunks of which no query of the block sees a key are
    skipped: later ones, other segments, those before the window. Few queries get longer chunks.
    """
    rows, shared, group, queries, width = q.shape
    block = _even(queries, size)
    chunk = _even(keys.shape[2], max(size, size * size // block))
    blocks = _cut(q, 3, block), jax.tree.map(lambda a: _cut(a, 1, block), query)
    chunks = (
        _cut(keys, 2, chunk),
        _cut(values, 2, chunk),
        jax.tree.map(lambda a: _cut(a, 1, chunk), key),
    )

    def of_block(xs: tuple[jax.Array, Positions]) -> jax.Array:
        q, query = xs
        q = q.reshape(rows, shared, group * block, width)

        def add(carry: Any, keys: jax.Array, values: jax.Array, key: Positions) -> Any:
            most, total, mixed = carry
            hidden = _hidden(query, key, window)[:, None, None]
            logits = matmul(q, keys.swapaxes(2, 3)).reshape(rows, shared, group, block, chunk)
            logits = softcap(logits, cap) + hidden
            new = jnp.maximum(most, jnp.max(logits, axis=-1, keepdims=True))
            new = jax.lax.stop_gradient(new)
            weights, shrink = jnp.exp(logits - new), jnp.exp(most - new)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            product = matmul(weights.reshape(rows, shared, -1, chunk), values)
            return new, total, mixed * shrink + product.reshape(mixed.shape)

        def step(carry: Any, xs: Any) -> Any:
            seen = _any_visible(query, xs[2], window)
            return jax.lax.cond(seen, add, lambda carry, *_: carry, carry, *xs), None

        shape = rows, shared, group, block
        zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
        carry = zeros((*shape, 1)) + _MASKED, zeros((*shape, 1)), zeros((*shape, width))
        if len(chunks[0]) == 1:
            carry = add(carry, *jax.tree.map(lambda a: a[0], chunks))
        else:
            carry, _ = jax.lax.scan(jax.checkpoint(step), carry, chunks)
        _, total, mixed = carry
        return mixed / jnp.where(total == 0, 1.0, total)

    if len(blocks[0]) == 1:
        return of_block(jax.tree.map(lambda a: a[0], blocks))[:, :, :, :queries]
    mixed = jax.lax.map(jax.checkpoint(of_block), blocks)  # [n, B, K, G, block, h]
    mixed = jnp.moveaxis(mixed, 0, 3).reshape(rows, shared, group, -1, width)
    return mixed[:, :, :, :queries]


def _even(count: int, most: int) -> int:
    """The size of chunks of at most `most` that `count` is cut into, as even as lanes allow."""
    if count <= most:
        return count
    even = -(-count // -(-count // most))
    return min(most, -(-even // 128) * 128)


def _cut(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pieces [n, .., size, ..] of x along an axis; zeros (False) fill the last one."""
    missing = -x.shape[axis] % size
    if missing:
        x = jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
    shape = *x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :]
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _any_visible(query: Positions, key: Positions, window: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether any of these queries may see any of these keys, from their ranges alone."""

    def least(a: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(key.mask, a, jnp.iinfo(a.dtype).max), axis=1)

    def most(a: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(key.mask, a, jnp.iinfo(a.dtype).min), axis=1)

    seen = jnp.max(query.index, axis=1) >= least(key.index)
    # Written so that nothing overflows where a chunk is all padding.
    seen &= (window == 0) | (jnp.min(query.index, axis=1) < most(key.index) + window)
    if query.segments is not None and key.segments is not None:
        own = jnp.max(query.segments, axis=1) >= least(key.segments)
        own &= jnp.min(query.segments, axis=1) <= most(key.segments)
        if query.start is not None:
            before = key.index < jnp.max(query.start, axis=1)[:, None]
            own |= jnp.any(before & (key.segments == EVERY), axis=1)
        seen &= own
    return jnp.any(seen)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _by_kernel(
    run: Any,
    windows: tuple[int, ...],
    cap: float,
    q: Float[Array, "B K G T h"],
    keys: Float[Array, "B K T h"],
    values: Float[Array, "B K T h"],
    at: Positions,
    _: Positions,
    window: Int[Array, ""],
) -> Float[Array, "B K G T h"]:
    """A kernel's output, compiled for each window that there may be; chunks' derivatives.

    Its arguments are those of the other forms, which `platform_dependent` calls alike.
    """
    windows = tuple(sorted(set(windows)))
    branches = [functools.partial(run, w, cap) for w in windows]
    which = jnp.argmax(jnp.asarray(windows) == window)
    return jax.lax.switch(which, branches, q, keys, values, at)


@_by_kernel.defjvp
def _tangents(run: Any, windows: tuple[int, ...], cap: float, primals: Any, tangents: Any) -> Any:
    at, _, window = primals[3:]

    def chunks(q: Array, keys: Array, values: Array) -> Array:
        return _in_chunks(cap, q, keys, values, at, at, window)

    _, moved = jax.jvp(chunks, primals[:3], tangents[:3])
    return _by_kernel(run, windows, cap, *primals), moved
