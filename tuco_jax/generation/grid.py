"""Many alphas at once: logits at wanted tokens under FTC_alpha for a grid of alphas.

    x_{l+1} = x_l + f_FT + (alpha - 1) FTC        (Definition 5.1 of arXiv 2506.23423)

What does not depend on alpha is computed once: x_0 is the same for all, hence all of layer 0, f_PT
and f_FT included. At the last layer only the wanted tokens are computed past keys and values. For
A alphas and L layers that is about 2 A (L - 2) + 2 blocks, where A whole runs take 2 A L. Layers
are the outer loop and alphas the inner one: a layer's weights are taken up once for all alphas,
and `chunk` of them at a time bound the memory.

A prefix that many texts share, such as the examples of a few-shot prompt, is read once an alpha:
`prefix_caches`, whose keys and values the suffixes then attend to.

Legend: A alphas, B rows, T tokens of a row (of a suffix, where there is a prefix), C wanted tokens
a row, V vocabulary, D residual width, L layers, P tokens of a prefix, K key/value heads, h head
width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from common_jax.errors import InputError
from tuco_jax.core.decompose import last_column, stacked_layers
from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import merge, variables
from tuco_jax.models.layers import (
    KeysValues,
    LayerInfo,
    Positions,
    Variables,
    block_delta,
    block_keys_values,
    whole_block,
)
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import constrain

__all__ = ["Prefix", "grid_logits", "prefix_caches"]

Held = tuple[KeysValues, KeysValues]  # the tuned model's and the base's


@struct.dataclass
class Prefix:
    """A prefix as both models have read it under each alpha.

    keys_values: the tuned model's and the base's, each two arrays [L, A, K, P, h]. alphas [L, A].
    """

    keys_values: Held
    alphas: jax.Array

    @property
    def length(self) -> int:
        """P, in tokens."""
        return self.keys_values[0][0].shape[3]


class _Places(NamedTuple):
    """One model's positions: of the tokens given, of the wanted ones, of all keys."""

    query: Positions
    wanted: Positions
    key: Positions


def _places(config: ModelConfig, mask: jax.Array, columns: jax.Array, before: int) -> _Places:
    """Positions of rows `mask` [B, T] that follow `before` tokens, wanted ones at [B, C]."""
    _check_lengths(config, before, mask.shape[1])
    index = before + jnp.cumsum(mask, axis=1) - 1
    lengths = index.max(axis=1) + 1
    query = Positions.at(config, index, mask, None, lengths)
    wanted = Positions.at(
        config,
        jnp.take_along_axis(index, columns, axis=1),
        jnp.take_along_axis(mask, columns, axis=1),
        None,
        lengths,
    )
    if not before:
        return _Places(query, wanted, query)
    rows = mask.shape[0]
    earlier = jnp.broadcast_to(jnp.arange(before), (rows, before))
    index = jnp.concatenate([earlier, index], axis=1)
    mask = jnp.concatenate([jnp.ones((rows, before), bool), mask], axis=1)
    return _Places(query, wanted, Positions(index, mask, None, None, None))


def _check_lengths(config: ModelConfig, before: int, tokens: int) -> None:
    """A prefix's keys hold for all rows only where no row's rotary table differs from its own."""
    for rope in config.ropes if before else ():
        switches = bool(rope.long_frequencies) and before <= rope.switch
        if before + tokens > rope.switch and (switches or rope.dynamic_factor):
            kind = "LongRoPE" if rope.long_frequencies else "dynamic NTK"
            raise InputError(
                f"a shared prefix of {before} tokens and suffixes of up to {tokens}: {kind} "
                f"changes its frequencies beyond {rope.switch} tokens, so that the prefix's keys "
                "would not hold; shorten them, or give whole texts without a prefix"
            )


def _layer_alphas(alphas: Any, depth: int) -> jax.Array:
    """[L, A] float32, of alphas [A] or [A, L]."""
    alphas = jnp.asarray(alphas, jnp.float32)
    if alphas.ndim not in (1, 2) or not alphas.shape[0] or alphas.shape[1:] not in ((), (depth,)):
        raise InputError(
            f"alphas have shape {list(alphas.shape)}: give [A], one number each, or "
            f"[A, {depth}], one a layer"
        )
    alphas = alphas if alphas.ndim == 2 else alphas[:, None]
    return jnp.broadcast_to(alphas, (alphas.shape[0], depth)).T


def _add(
    config: ModelConfig,
    weights: Variables,
    x: jax.Array,
    at: _Places,
    info: LayerInfo,
    held: KeysValues | None,
    *,
    columns: jax.Array | None = None,
    keep: bool = False,
) -> tuple[jax.Array, KeysValues | None]:
    """What one block adds at every token of x [B, T, D], or at `columns` [B, C] only.

    held: the prefix's keys and values, [K, P, h] each. keep: also return those of x.
    """
    if held is None and columns is None and not keep:
        return whole_block(config, weights, x, at.query, info).total, None
    new = seen = block_keys_values(config, weights, x, at.query, info)
    if held is not None:
        keys, values = (
            jnp.concatenate([jnp.broadcast_to(old, (len(x), *old.shape)), own], axis=2)
            for old, own in zip(held, new, strict=True)
        )
        seen = keys, values
    query = at.query
    if columns is not None:
        x, query = _take(x, columns), at.wanted
    return block_delta(config, weights, x, seen, query, at.key, info).total, new


def _take(x: jax.Array, columns: jax.Array) -> jax.Array:
    """Tokens [B, C, D] of x [B, T, D]."""
    return jnp.take_along_axis(x, columns[:, :, None], axis=1)


def _default_chunk(tokens: int) -> int:
    """Alphas to run at once, for so many tokens of one: what keeps products large, and no more."""
    budget = 1024 if jax.default_backend() == "cpu" else 8192
    return max(1, budget // tokens)


def _map(function: Any, xs: Any, chunk: int) -> Any:
    """`function` over the alphas, the first axis of xs, `chunk` of them at once."""
    count = len(jax.tree.leaves(xs)[0])
    if chunk >= count:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=chunk if chunk > 1 else None)


class _Run:
    """The layers of a pair over given rows; `held` [L, A, ...] is the prefix, or None."""

    def __init__(
        self,
        pair: Pair,
        mask: jax.Array,
        columns: jax.Array,
        alphas: jax.Array,
        prefix: Prefix | None,
        chunk: int | None,
        mesh: Mesh | None,
    ) -> None:
        self.pair, self.columns, self.alphas, self.mesh = pair, columns, alphas, mesh
        self.chunk = chunk or _default_chunk(mask.size)
        before = prefix.length if prefix else 0
        self.tuned = _places(pair.tuned_config, mask, columns, before)
        self.base = _places(pair.base_config, mask, columns, before)
        self.stack = stacked_layers(pair), alphas, prefix.keys_values if prefix else None

    def layer(self, index: jax.Array | int) -> Any:
        """Weights, alphas [A] and the prefix's keys and values [A, K, P, h] of one layer."""
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), self.stack
        )

    def deltas(
        self, weights: Any, x: jax.Array, held: Held | None, **options: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """f_FT, FTC, and both models' keys and values of x (None where they are not made)."""
        base, changed, lora, base_info, tuned_info = weights
        held_tuned, held_base = held or (None, None)
        tuned = variables(merge(base, changed), lora)
        ft, new_tuned = _add(
            self.pair.tuned_config, tuned, x, self.tuned, tuned_info, held_tuned, **options
        )
        pt, new_base = _add(
            self.pair.base_config, {"params": base}, x, self.base, base_info, held_base, **options
        )
        return ft, ft - pt, (new_tuned, new_base)

    def first(self, x: jax.Array, keep: bool = False) -> tuple[jax.Array, Any]:
        """Layer 0, once for all alphas: streams [A, B, T, D], keys and values of x_0."""
        weights, alphas, held = self.layer(0)
        held = None if held is None else jax.tree.map(lambda a: a[0], held)
        ft, ftc, new = self.deltas(weights, x, held, keep=keep)
        moved = jax.vmap(lambda alpha: x + ft + (alpha - 1) * ftc)(alphas)
        return moved, new

    def middle(self, x: jax.Array, index: jax.Array, keep: bool = False) -> tuple[jax.Array, Any]:
        """One layer at every token, x [A, B, T, D]."""
        weights, alphas, held = self.layer(index)

        def one(xs: Any) -> Any:
            x, alpha, held = xs
            ft, ftc, new = self.deltas(weights, x, held, keep=keep)
            x = constrain(x + ft + (alpha - 1) * ftc, self.mesh)
            return x, new if keep else None

        return _map(one, (x, alphas, held), self.chunk)

    def last(self, x: jax.Array) -> jax.Array:
        """The last layer at the wanted tokens, and their logits [A, B, C, V]."""
        weights, alphas, held = self.layer(self.pair.base_config.depth - 1)
        pair = self.pair

        def one(xs: Any) -> jax.Array:
            x, alpha, held = xs
            ft, ftc, _ = self.deltas(weights, x, held, columns=self.columns)
            x = _take(x, self.columns) + ft + (alpha - 1) * ftc
            return decoder.logits(pair.tuned_config, pair.tuned_params, x, pair.lora)

        return _map(one, (x, alphas, held), self.chunk)


@functools.partial(jax.jit, static_argnames=("chunk", "mesh"))
def grid_logits(
    pair: Pair,
    tokens: jax.Array,
    mask: jax.Array,
    alphas: jax.Array | None = None,
    columns: jax.Array | None = None,
    *,
    prefix: Prefix | None = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Logits at wanted tokens under every alpha of a grid, as `decompose` gives for each.

    Args:
        pair: the two models.
        tokens: [B, T] int; with a prefix, what follows it.
        mask: [B, T], True at real tokens; padding on either side.
        alphas: [A], or [A, L] with one a layer; of the prefix where there is one.
        columns: [B, C] int, the wanted tokens of each row. None: each row's last real token.
        prefix: what all rows begin with, from `prefix_caches`; positions go on after it.
        chunk: alphas that are run at once, for memory; None: as many as the backend gains by.
        mesh: where the pair is spread (`models/sharding.py`); rows stay cut over it.

    Returns [A, B, V] float32, or [A, B, C, V] for given columns. Compiled once a shape; the alphas
    are data. Raises InputError for alphas of the wrong shape or both given, and for a prefix
    whose rotary frequencies the rows change.
    """
    if (alphas is None) == (prefix is None):
        raise InputError("give alphas, or a prefix, which has its own; one of the two")
    depth = pair.tuned_config.depth
    alphas = prefix.alphas if prefix else _layer_alphas(alphas, depth)
    wanted = last_column(mask)[:, None] if columns is None else columns
    mask = mask.astype(bool)
    run = _Run(pair, mask, wanted, alphas, prefix, chunk, mesh)
    x = decoder.embed(pair.tuned_config, pair.tuned_params, tokens, run.tuned.query)
    x = constrain(x, mesh)
    if depth == 1:
        x = jnp.broadcast_to(x, (alphas.shape[1], *x.shape))
    else:
        x, _ = run.first(x)
        x, _ = jax.lax.scan(lambda x, i: (run.middle(x, i)[0], None), x, jnp.arange(1, depth - 1))
    logits = run.last(x)
    return logits[:, :, 0] if columns is None else logits


@functools.partial(jax.jit, static_argnames=("chunk", "mesh"))
def prefix_caches(
    pair: Pair,
    tokens: jax.Array,
    alphas: jax.Array,
    *,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Prefix:
    """Read a prefix, tokens [P] int, once under each alpha ([A], or [A, L] with one a layer).

    chunk and mesh as in `grid_logits`. Raises InputError for an empty prefix and for alphas of the
    wrong shape.
    """
    if tokens.ndim != 1 or not tokens.size:
        raise InputError(f"prefix tokens have shape {list(tokens.shape)}: give [P], one or more")
    depth = pair.tuned_config.depth
    by_layer = _layer_alphas(alphas, depth)
    count = by_layer.shape[1]
    mask = jnp.ones((1, tokens.size), bool)
    run = _Run(pair, mask, jnp.zeros((1, 1), int), by_layer, None, chunk, mesh)
    x = decoder.embed(pair.tuned_config, pair.tuned_params, tokens[None], run.tuned.query)

    def own(weights: Any, x: jax.Array) -> Held:
        base, changed, lora, base_info, tuned_info = weights
        tuned = variables(merge(base, changed), lora)
        return (
            block_keys_values(pair.tuned_config, tuned, x, run.tuned.query, tuned_info),
            block_keys_values(pair.base_config, {"params": base}, x, run.base.query, base_info),
        )

    kept = []
    if depth > 1:
        x, new = run.first(x, keep=True)
        kept.append(jax.tree.map(lambda a: jnp.broadcast_to(a, (1, count, *a.shape)), new))
        x, new = jax.lax.scan(
            lambda x, i: run.middle(x, i, keep=True), x, jnp.arange(1, depth - 1)
        )
        kept.append(new)
    else:
        x = jnp.broadcast_to(x, (count, *x.shape))
    weights = run.layer(depth - 1)[0]
    new = _map(functools.partial(own, weights), x, run.chunk)
    kept.append(jax.tree.map(lambda a: a[None], new))
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:, :, 0], *kept)
    return Prefix(joined, by_layer)
