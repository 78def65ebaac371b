"""Softmax attention over keys and values, by backend, in one place.

Legend: B batch, T tokens (keys), Q query tokens, H query heads, K key/value heads, G = H / K,
h head width.
"""

import itertools

import jax
import jax.numpy as jnp

from tuco_jax.models.numerics import matmul, softcap
from tuco_jax.models.positions import Positions

__all__ = ["attend"]

_MASKED = -1e30  # finite, so that a query which sees no key yields finite numbers


def attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query: Positions,
    key: Positions,
    window: jax.Array,
    cap: float = 0.0,
) -> jax.Array:
    """softmax(cap(q k)) v of each query over the keys that it sees: [B, Q, H, h] float32.

    Args:
        q: [B, Q, H, h] float32, already scaled.
        keys: [B, K, T, h]; head i of q goes with head i // G of these.
        values: [B, K, T, h].
        query: where the queries stand, [B, Q].
        key: where the keys stand, [B, T]; `query` itself, the same object, where a row attends
            to itself, which lets a backend leave out columns that no query can see.
        window: int, how many tokens back a query sees, itself included; 0: all.
        cap: logits are squashed into (-cap, cap); 0: they are not.
    """
    rows, queries, heads, width = q.shape
    shared = keys.shape[1]
    q = q.reshape(rows, queries, shared, heads // shared, width).transpose(0, 2, 3, 1, 4)
    mixed = _in_parts(q, keys, values, query, key, window, cap)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, width)


def _in_parts(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query: Positions,
    key: Positions,
    window: jax.Array,
    cap: float,
) -> jax.Array:
    """The CPU's form, [B, K, G, Q, h] of q in that shape: logits in memory, a part at a time.

    Heads first and the heads of a group in one matrix: XLA on CPU runs these products three times
    as fast as one einsum over all five axes.
    """
    rows, shared, group, queries, width = q.shape
    # Added rather than selected: the same number, and XLA on CPU fuses attention into one.
    hidden = jnp.where(_visible(query, key, window), 0.0, _MASKED)[:, None, None]
    parts = []
    for start, stop, seen in _query_parts(query, key, queries, keys.shape[2]):
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


def _visible(query: Positions, key: Positions, window: jax.Array) -> jax.Array:
    """Which keys a query attends to, [B, Q, T] bool."""
    distance = query.index[:, :, None] - key.index[:, None, :]
    visible = (distance >= 0) & key.mask[:, None, :]
    visible &= (window == 0) | (distance < window)
    if query.segments is not None and key.segments is not None:
        visible &= query.segments[:, :, None] == key.segments[:, None, :]
    return visible


def _query_parts(
    query: Positions, key: Positions, queries: int, keys: int
) -> list[tuple[int, int, int]]:
    """(start, stop, keys that any of these queries can see): queries that are computed together.

    Where a row attends to itself no token sees a later column, so that its first half needs no
    more than the first half of the keys. Short rows gain nothing by it, and programs grow.
    """
    count = 1 if queries < 96 else min(8, queries // 24)
    if query is not key or query.segments is not None or count == 1:
        return [(0, queries, keys)]
    bounds = [queries * i // count for i in range(count + 1)]
    return [(start, stop, stop) for start, stop in itertools.pairwise(bounds)]
