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

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from common_jax.errors import InputError
from tuco_jax.core.budget import default_budget
from tuco_jax.core.cache import Cache, Held
from tuco_jax.core.layer import Half, PairLayer
from tuco_jax.core.places import At, Places, last_column, pick
from tuco_jax.core.stream import begin
from tuco_jax.core.walk import Source, as_source, walk
from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.layers import KeysValues
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import constrain

__all__ = ["GridStep", "Prefix", "grid_logits", "prefix_caches"]


@struct.dataclass
class Prefix:
    """A prefix as both models have read it under each alpha: keys and values [L, A, K, P, h].

    alphas [L, A].
    """

    cache: Cache
    alphas: jax.Array


@struct.dataclass
class GridStep:
    """One layer for all alphas, `chunk` of them at once; returns keys and values where `keep`.

    x: [B, T, D] where all alphas have one stream (`once`, the first layer), else [A, B, T, D];
    what comes out is [A, ...]. own: alphas [A], and the prefix's keys and values, M pairs of
    [A, K, P, h], or None. wanted: at the wanted tokens alone, [A, B, C, D].
    """

    places: Places
    cache: Cache | None
    chunk: int = struct.field(pytree_node=False)
    once: bool = struct.field(pytree_node=False, default=False)
    wanted: bool = struct.field(pytree_node=False, default=False)
    keep: bool = struct.field(pytree_node=False, default=False)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    def __call__(
        self, x: jax.Array, layer: PairLayer, own: tuple[jax.Array, Held | None]
    ) -> tuple[jax.Array, Any]:
        """X + f_FT + (alpha - 1) FTC for each alpha."""
        alphas, held = own
        if self.once:
            first = None if held is None else jax.tree.map(lambda a: a[0], held)
            ft, ftc, new = self._deltas(x, layer, first)
            x = self._wanted(x)
            moved = jax.vmap(lambda alpha: x + ft + (alpha - 1) * ftc)(alphas)
            every = len(alphas)
            return moved, jax.tree.map(lambda a: jnp.broadcast_to(a, (every, *a.shape)), new)

        def one(xs: Any) -> Any:
            x, alpha, held = xs
            ft, ftc, new = self._deltas(x, layer, held)
            return constrain(self._wanted(x) + ft + (alpha - 1) * ftc, self.mesh), new

        return each_alpha(one, (x, alphas, held), self.chunk)

    def _wanted(self, x: jax.Array) -> jax.Array:
        return pick(x, self.places.columns) if self.wanted else x  # pyright: ignore[reportArgumentType]

    def _deltas(
        self, x: jax.Array, layer: PairLayer, held: Held | None
    ) -> tuple[jax.Array, jax.Array, Any]:
        """f_FT, FTC, and both models' keys and values of x where they are kept."""
        ft, tuned = self._add(layer.tuned, x, self.places.tuned, None if held is None else held[0])
        pt, base = self._add(layer.base, x, self.places.base, None if held is None else held[1])
        return ft, ft - pt, (tuned, base) if self.keep else None

    def _add(
        self, half: Half, x: jax.Array, at: At, held: KeysValues | None
    ) -> tuple[jax.Array, KeysValues | None]:
        join = None
        if held is not None:
            assert self.cache is not None
            join = functools.partial(self.cache.join, held)
        if self.wanted:
            delta, new = half.wanted(self._wanted(x), x, at, join)
        elif join is None and not self.keep:
            return half.whole(x, at).total, None
        else:
            delta, new = half.following(x, at, join or (lambda own: own))
        return delta.total, new


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


def _default_chunk(tokens: int) -> int:
    """Alphas to run at once, for so many tokens of one: what keeps products large, and no more."""
    return max(1, default_budget() // tokens)


def each_alpha(function: Any, xs: Any, chunk: int) -> Any:
    """`function` over the alphas, the first axis of xs, `chunk` of them at once."""
    count = len(jax.tree.leaves(xs)[0])
    if chunk >= count:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=chunk if chunk > 1 else None)


def grid_logits(
    pair: Pair | Source,
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
        pair: the two models, or a source of their layers (`core/walk.py`).
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
    source = as_source(pair)
    ends = source.ends
    depth = ends.tuned_config.depth
    by_layer = prefix.alphas if prefix else _layer_alphas(alphas, depth)
    cache = prefix.cache if prefix else None
    wanted = last_column(mask)[:, None] if columns is None else columns
    x, places = _begin(ends, tokens, mask, wanted, cache.bare() if cache else None, mesh=mesh)
    chunk = chunk or _default_chunk(mask.size)
    step = GridStep(places, cache.bare() if cache else None, chunk, mesh=mesh)
    own = by_layer, cache.keys_values if cache else None
    middle = depth - 1
    if depth > 1:
        x, _ = walk(dataclasses.replace(step, once=True), x, source, own, stop=1)
        if middle > 1:
            x, _ = walk(step, x, source, own, start=1, stop=middle)
    last = dataclasses.replace(step, wanted=True, once=depth == 1)
    x, _ = walk(last, x, source, own, start=middle)
    logits = _logits(ends, x, chunk)
    return logits[:, :, 0] if columns is None else logits


@functools.partial(jax.jit, static_argnames="mesh")
def _begin(
    ends: Pair,
    tokens: jax.Array,
    mask: jax.Array,
    columns: jax.Array,
    cache: Cache | None,
    *,
    mesh: Mesh | None,
) -> tuple[jax.Array, Places]:
    """x_0 [B, T, D] and where it stands, behind a shared prefix if there is one."""
    mask = mask.astype(bool)
    if cache is None:
        places = Places.of(ends, mask, columns)
    else:
        for config in (ends.base_config, ends.tuned_config):
            _check_lengths(config, cache.length, mask.shape[1])
        index = cache.length + jnp.cumsum(mask, axis=1) - 1
        places = Places.after(ends, cache.at, index, mask, columns=columns)
    return begin(ends, tokens, None, places, mesh), places


@functools.partial(jax.jit, static_argnames="chunk")
def _logits(ends: Pair, x: jax.Array, chunk: int) -> jax.Array:
    """[A, B, C, V] of streams [A, B, C, D]."""
    return each_alpha(
        lambda x: decoder.logits(ends.tuned_config, ends.tuned_params, x, ends.lora), x, chunk
    )


def prefix_caches(
    pair: Pair | Source,
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
    source = as_source(pair)
    ends = source.ends
    depth = ends.tuned_config.depth
    by_layer = _layer_alphas(alphas, depth)
    mask = jnp.ones((1, tokens.size), bool)
    x, places = _begin(ends, tokens[None], mask, jnp.zeros((1, 1), int), None, mesh=mesh)
    chunk = chunk or _default_chunk(mask.size)
    step = GridStep(places, None, chunk, keep=True, mesh=mesh)
    own = by_layer, None
    x, first = walk(dataclasses.replace(step, once=True), x, source, own, stop=1)
    parts = [first]
    if depth > 2:
        x, middle = walk(step, x, source, own, start=1, stop=depth - 1)
        parts.append(middle)
    if depth > 1:  # of the last layer keys and values are wanted: one token past them
        step = dataclasses.replace(step, wanted=True)
        parts.append(walk(step, x, source, own, start=depth - 1)[1])
    held = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:, :, 0], *parts)
    return Prefix(Cache.prefix(held, mask[0]), by_layer)
