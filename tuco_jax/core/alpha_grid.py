"""Logits at selected tokens under FTC_alpha, for a whole grid of alphas at once.

    x_{l+1} = x_l + f_FT + (alpha - 1) FTC        (Definition 5.1 of arXiv 2506.23423)

What does not depend on alpha is computed once: x_0 is the same for all, hence all of layer 0, f_PT
and f_FT included. At the last layer, all but keys and values is computed at the selected tokens
only. For A alphas and L layers that is about 2 A (L - 2) + 2 blocks, where A whole runs take
2 A L. Layers are the outer loop and alphas the inner one, so that a layer's weights are read once
for all alphas; `chunk` alphas run together, which bounds the memory.

A prefix that many texts share, such as the examples of a few-shot prompt, is run once for each
alpha by `prefix_caches`; the suffixes then attend to its keys and values.

Legend: A alphas, B rows, T tokens of a row (of a suffix, where there is a prefix), C selected
tokens of a row, V vocabulary, D residual width, L layers, P tokens of a prefix, K key/value heads,
h head width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from common_jax.errors import InputError
from common_jax.mesh import constrain
from tuco_jax.core.budget import default_budget
from tuco_jax.core.cache import Cache, LayerCache
from tuco_jax.core.layer import ModelLayer, PairLayer
from tuco_jax.core.places import ModelPlaces, Places, last_column, pick
from tuco_jax.core.residual import begin
from tuco_jax.core.tokens import as_tokens
from tuco_jax.core.walk import Source, as_source, walk
from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.layers import Delta
from tuco_jax.models.pair import Pair

__all__ = ["PAPER_GRID", "GridStep", "Prefix", "grid_logits", "prefix_caches"]

PAPER_GRID = (0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25)  # the paper's alphas, section 5.1

Tree = TypeVar("Tree")


@struct.dataclass
class Prefix:
    """Both models' keys and values of a prefix under each alpha, [L, A, K, P, h]."""

    cache: Cache
    alphas: Float[Array, "L A"]


@struct.dataclass
class GridStep:
    """The step of one layer for all alphas, `chunk` of them at once.

    own: alphas, and what the cache holds of the prefix, M pairs of [A, K, P, h], or None. once:
    all alphas share one residual stream, as in the first layer. select: move it at the selected
    tokens alone. keep: return keys and values, too.
    """

    places: Places
    cache: Cache | None
    chunk: int = struct.field(pytree_node=False)
    once: bool = struct.field(pytree_node=False, default=False)
    select: bool = struct.field(pytree_node=False, default=False)
    keep: bool = struct.field(pytree_node=False, default=False)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    def __call__(
        self,
        x: Float[Array, "B T D"] | Float[Array, "A B T D"],
        layer: PairLayer,
        own: tuple[Float[Array, " A"], LayerCache | None],
    ) -> tuple[Float[Array, "A B T D"] | Float[Array, "A B C D"], LayerCache | None]:
        """Move the stream of each alpha to x + f_FT + (alpha - 1) FTC."""
        alphas, held = own

        def one(xs: Any) -> Any:
            x, alpha, held = xs
            stream, ftc, new = self._parts(x, layer, held)
            return constrain(stream + (alpha - 1) * ftc, self.mesh), new

        if not self.once:
            return each_alpha(one, (x, alphas, held), self.chunk)
        stream, ftc, new = self._parts(x, layer, jax.tree.map(lambda a: a[0], held))
        new = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(alphas), *a.shape)), new)
        return jax.vmap(lambda alpha: stream + (alpha - 1) * ftc)(alphas), new

    def _parts(self, x: Float[Array, "B T D"], layer: PairLayer, held: LayerCache | None) -> Any:
        """The stream plus f_FT; FTC; and with `keep` both models' keys and values of x."""
        last = None
        if self.select:
            assert self.places.columns is not None
            last = pick(x, self.places.columns)

        def added(model: ModelLayer, at: ModelPlaces, index: int) -> tuple[Delta, Any]:
            join = None
            if held is not None and self.cache is not None:
                join = functools.partial(self.cache.join, held[index])
            return model.added(x, at, last=last, join=join, keep=self.keep)

        ft, tuned = added(layer.tuned, self.places.tuned, 0)
        pt, base = added(layer.base, self.places.base, 1)
        stream = (x if last is None else last) + ft.total
        return stream, ft.total - pt.total, (tuned, base) if self.keep else None


def _check_lengths(config: ModelConfig, before: int, tokens: int) -> None:
    """Raise InputError where a row's rotary frequencies differ from those of the prefix's keys."""
    for rope in config.ropes if before else ():
        switches = bool(rope.long_frequencies) and before <= rope.switch
        if before + tokens > rope.switch and (switches or rope.dynamic_factor):
            kind = "LongRoPE" if rope.long_frequencies else "dynamic NTK"
            raise InputError(
                f"a shared prefix of {before} tokens and suffixes of up to {tokens}: {kind} "
                f"changes its frequencies beyond {rope.switch} tokens, so that the prefix's keys "
                "would not hold; shorten them, or give whole texts without a prefix"
            )


def _layer_alphas(
    alphas: Float[Array, " A"] | Float[Array, "A L"] | None, depth: int
) -> Float[Array, "L A"]:
    """Alphas [A] or [A, L] by layer, float32."""
    alphas = jnp.asarray(alphas, jnp.float32)
    if alphas.ndim not in (1, 2) or not alphas.shape[0] or alphas.shape[1:] not in ((), (depth,)):
        raise InputError(
            f"alphas have shape {list(alphas.shape)}: give [A], one number each, or "
            f"[A, {depth}], one a layer"
        )
    alphas = alphas if alphas.ndim == 2 else alphas[:, None]
    return jnp.broadcast_to(alphas, (alphas.shape[0], depth)).T


def _default_chunk(tokens: int) -> int:
    """Alphas to run at once, where one has so many tokens: as many as fill the budget."""
    return max(1, default_budget() // tokens)


def each_alpha(function: Callable[[Any], Tree], xs: Any, chunk: int) -> Tree:
    """Map `function` over the alphas, the first axis of xs, `chunk` of them at once."""
    count = len(jax.tree.leaves(xs)[0])
    if chunk >= count:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=chunk if chunk > 1 else None)


def grid_logits(
    pair: Pair | Source,
    tokens: Int[Array, "B T"],
    mask: Shaped[Array, "B T"],
    alphas: Float[Array, " A"] | Float[Array, "A L"] | None = None,
    columns: Int[Array, "B C"] | None = None,
    *,
    prefix: Prefix | None = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "A B V"] | Float[Array, "A B C V"]:
    """Logits at selected tokens under every alpha of a grid, as `decompose` gives for each.

    Args:
        pair: the two models, or a source of their layers (`core/walk.py`).
        tokens: token ids; with a prefix, those after it.
        mask: True at real tokens; padding on either side.
        alphas: one number each, or one for each layer; None with a prefix, which has its own.
        columns: of the selected tokens. None: each row's last real token.
        prefix: the beginning of all rows, from `prefix_caches`; positions continue after it.
        chunk: alphas that are run at once, which bounds memory; None: by the backend.
        mesh: the one that the pair is sharded over (`models/sharding.py`); rows are sharded, too.

    Returns float32, with an axis C where columns are given. Compiled once for each shape; alphas
    are data. Raises InputError for alphas of the wrong shape, for both or neither of alphas and
    prefix, and for rows so long that their rotary frequencies differ from the prefix's.
    """
    if (alphas is None) == (prefix is None):
        raise InputError("give alphas, or a prefix, which has its own; one of the two")
    source = as_source(pair)
    ends = source.ends
    depth = ends.tuned_config.depth
    tokens, mask = as_tokens(tokens, mask, ends.tuned_config.vocab_size)
    by_layer = prefix.alphas if prefix else _layer_alphas(alphas, depth)
    cache = prefix.cache if prefix else None
    selected = last_column(mask)[:, None] if columns is None else columns
    x, places = _begin(ends, tokens, mask, selected, cache.bare() if cache else None, mesh=mesh)
    chunk = chunk or _default_chunk(mask.size)
    step = GridStep(places, cache.bare() if cache else None, chunk, mesh=mesh)
    own = by_layer, cache.keys_values if cache else None
    middle = depth - 1
    if depth > 1:
        x, _ = walk(dataclasses.replace(step, once=True), x, source, own, stop=1)
        if middle > 1:
            x, _ = walk(step, x, source, own, start=1, stop=middle)
    last = dataclasses.replace(step, select=True, once=depth == 1)
    x, _ = walk(last, x, source, own, start=middle)
    logits = _logits(ends, x, chunk)
    return logits[:, :, 0] if columns is None else logits


@functools.partial(jax.jit, static_argnames="mesh")
def _begin(
    ends: Pair,
    tokens: Int[Array, "B T"],
    mask: Shaped[Array, "B T"],
    columns: Int[Array, "B C"],
    cache: Cache | None,
    *,
    mesh: Mesh | None,
) -> tuple[Float[Array, "B T D"], Places]:
    """x_0 and its places, after a shared prefix if there is one."""
    mask = mask.astype(bool)
    if cache is None:
        places = Places.of(ends, mask, columns)
    else:
        for config in (ends.base_config, ends.tuned_config):
            _check_lengths(config, cache.length, mask.shape[1])
        index = cache.length + jnp.cumsum(mask, axis=1) - 1
        places = Places.after(ends, cache, index, mask, columns=columns)
    return begin(ends, tokens, None, places, mesh), places


@functools.partial(jax.jit, static_argnames="chunk")
def _logits(ends: Pair, x: Float[Array, "A B C D"], chunk: int) -> Float[Array, "A B C V"]:
    return each_alpha(
        lambda x: decoder.logits(ends.tuned_config, ends.tuned_params, x, ends.lora), x, chunk
    )


def prefix_caches(
    pair: Pair | Source,
    tokens: Int[Array, " P"],
    alphas: Float[Array, " A"] | Float[Array, "A L"],
    *,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Prefix:
    """Run a prefix once under each alpha, for `grid_logits` of rows that begin with it.

    alphas, chunk, mesh: as in `grid_logits`. Raises InputError for an empty prefix and for alphas
    of the wrong shape.
    """
    source = as_source(pair)
    ends = source.ends
    if np.ndim(tokens) != 1 or not np.size(tokens):
        shape = list(np.shape(tokens))
        raise InputError(f"prefix tokens have shape {shape}: give [P], one or more")
    row = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    rows, mask = as_tokens(row[None], None, ends.tuned_config.vocab_size)
    tokens = rows[0]
    depth = ends.tuned_config.depth
    by_layer = _layer_alphas(alphas, depth)
    x, places = _begin(ends, tokens[None], mask, jnp.zeros((1, 1), int), None, mesh=mesh)
    chunk = chunk or _default_chunk(mask.size)
    step = GridStep(places, None, chunk, keep=True, mesh=mesh)
    own = by_layer, None
    x, first = walk(dataclasses.replace(step, once=True), x, source, own, stop=1)
    parts = [first]
    if depth > 2:
        x, middle = walk(step, x, source, own, start=1, stop=depth - 1)
        parts.append(middle)
    if depth > 1:  # only keys and values of the last layer are used: one token suffices
        step = dataclasses.replace(step, select=True)
        parts.append(walk(step, x, source, own, start=depth - 1)[1])
    held = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:, :, 0], *parts)
    return Prefix(Cache.prefix(held, mask[0]), by_layer)
