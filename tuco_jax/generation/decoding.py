"""Decoding with key/value caches along the alpha-scaled stream (TuCo paper, Definition 5.1).

    x_{l+1} = x_l + f_FT + (alpha - 1) FTC        (= x_l + PTC + alpha FTC, exact at alpha = 1)

Both models' blocks run on one stream, so there are two caches, PT's and FT's weights applied to
the same x_l, each with its own rotary tables, window and epsilon; they hold for one alpha only.
Embedding, final norm and head are FT's. Where alpha is 1 throughout, PT is not run at all.

Columns of a cache are a prompt's tokens, padded on the right to P, then new tokens: every row
writes its j-th new token in column P + j, at its own position (prompt length + j). Attention goes
by positions, so the gap between is never seen.

Legend: B batch, P padded prompt length, N room for new tokens, S = P + N columns, T tokens given
at once, D residual width, V vocabulary, L layers, K key/value heads, h head width, M models run
(1 or 2, the tuned one first).
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from tuco_jax.core.decompose import Layers
from tuco_jax.generation.sampling import Sampling, choose
from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, merge, variables
from tuco_jax.models.layers import (
    KeysValues,
    Positions,
    block_delta,
    block_keys_values,
    layer_infos,
)
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import constrain

__all__ = [
    "Cache",
    "Places",
    "Progress",
    "Request",
    "add_layer",
    "advance",
    "any_going",
    "begin",
    "decoding_layers",
    "emit",
    "latest",
    "make_cache",
    "places",
    "resume",
]


KeysValuesOfModels = tuple[KeysValues, ...]


@struct.dataclass
class Cache:
    """What the blocks have seen. `filled` is the number of columns written so far.

    keys_values: M pairs of [L, B, K, S, h]. index [B, S] int, each column's position; mask [B, S]
    bool, False at padding. A column not yet written has a later position than any query.
    """

    keys_values: KeysValuesOfModels
    index: jax.Array
    mask: jax.Array
    filled: jax.Array


def make_cache(pair: Pair, mask: jax.Array, room: int, *, steered: bool) -> Cache:
    """An empty cache for right-padded prompts with `mask` [B, P] and `room` new tokens a row.

    steered: hold both models' keys and values, not the tuned model's alone.
    """
    rows = mask.shape[0]
    lengths = mask.sum(axis=1)
    index = jnp.concatenate(
        [jnp.cumsum(mask, axis=1) - 1, lengths[:, None] + jnp.arange(room)], axis=1
    )
    mask = jnp.concatenate([mask.astype(bool), jnp.ones((rows, room), bool)], axis=1)
    models = [(pair.tuned_config, pair.tuned_params)]
    if steered:
        models.append((pair.base_config, pair.base))

    def empty(config: ModelConfig, params: Params) -> tuple[jax.Array, jax.Array]:
        rows, columns = mask.shape
        shape = (config.depth, rows, config.kv_heads, columns, config.head_dim)
        dtype = params["layers"]["attention"]["k"]["kernel"].dtype
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    return Cache(tuple(empty(*m) for m in models), index, mask, jnp.int32(0))


def advance(
    pair: Pair,
    cache: Cache,
    tokens: jax.Array,
    alpha: jax.Array | None,
    *,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Cache]:
    """Run the next T columns, `tokens` [B, T], through all layers.

    alpha: [L, B], or None for the tuned model alone; as the cache was made. Returns the stream
    before the final norm, [B, T, D] float32, and the cache with these columns filled.

    LongRoPE and dynamic NTK decide by the length that a row has now; keys in the cache keep the
    table they were made with.
    """
    at = places(pair, cache, tokens.shape[1])
    configs = pair.tuned_config, pair.base_config

    def body(x, xs):
        layer, alpha, held = xs
        x, new, _ = add_layer(configs, x, layer, alpha, held, at, mesh=mesh)
        return x, new

    x = decoder.embed(pair.tuned_config, pair.tuned_params, tokens, at.tuned)
    xs = decoding_layers(pair, steered=alpha is not None), alpha, cache.keys_values
    x, new = jax.lax.scan(body, constrain(x, mesh), xs)
    # Written after the scan, which only reads the cache: one update in place, all layers at once.
    keys_values = jax.tree.map(
        lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, cache.filled, axis=3),
        cache.keys_values,
        new,
    )
    filled = cache.filled + tokens.shape[1]
    return x, dataclasses.replace(cache, keys_values=keys_values, filled=filled)


class Places(NamedTuple):
    """Where the columns given now stand, for each model; all columns; the first one given."""

    tuned: Positions
    base: Positions
    key: Positions
    filled: jax.Array


def places(pair: Pair, cache: Cache, columns: int) -> Places:
    """Of the next `columns` columns of a cache."""

    def now(a: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a, cache.filled, columns, axis=1)

    index = now(cache.index)
    lengths = index[:, -1] + 1
    key = Positions(cache.index, cache.mask, None, None, None)
    at_tuned, at_base = (
        Positions.at(config, index, now(cache.mask), None, lengths)
        for config in (pair.tuned_config, pair.base_config)
    )
    return Places(at_tuned, at_base, key, cache.filled)


def decoding_layers(pair: Pair, *, steered: bool) -> Layers:
    """What `add_layer` needs of the pair, stacked: of the tuned model alone unless `steered`.

    Merged inside the scan where both run, so that what an adapter shares with its base is one
    operand, and products with it are computed once.
    """
    params, changed = pair.base["layers"], pair.tuned.get("layers", {})
    if not steered:
        params, changed = pair.tuned_params["layers"], {}
    infos = layer_infos(pair.base_config), layer_infos(pair.tuned_config)
    return params, changed, pair.lora.get("layers", {}), *infos


def add_layer(
    configs: tuple[ModelConfig, ModelConfig],
    x: jax.Array,
    layer: Layers,
    alpha: jax.Array | None,
    held: KeysValuesOfModels,
    at: Places,
    *,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, KeysValuesOfModels, KeysValuesOfModels]:
    """One layer over the columns given now, x [B, T, D].

    configs: (tuned's, base's). layer, alpha [B] or None, and held, M pairs of [B, K, S, h]: an
    index of each leaf of `decoding_layers`, of alpha [L, B] and of the cache. Returns the stream,
    the columns' own keys and values [B, K, T, h], and `held` with them in it.
    """
    base, changed, lora, base_info, tuned_info = layer

    def add(config, weights, query, info, held):
        new = block_keys_values(config, weights, x, query, info)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, one, at.filled, axis=2)
            for old, one in zip(held, new, strict=True)
        )
        seen = keys, values
        return block_delta(config, weights, x, seen, query, at.key, info).total, new, seen

    tuned = variables(merge(base, changed), lora)
    ft, new, seen = add(configs[0], tuned, at.tuned, tuned_info, held[0])
    if alpha is None:
        return constrain(x + ft, mesh), (new,), (seen,)
    pt, base_new, base_seen = add(configs[1], {"params": base}, at.base, base_info, held[1])
    x = x + ft + (alpha[:, None, None] - 1) * (ft - pt)
    return constrain(x, mesh), (new, base_new), (seen, base_seen)


@struct.dataclass
class Request:
    """What a batch asks for. alpha [L, B] or None; the others [B], but eos [E]."""

    alpha: jax.Array | None
    limits: jax.Array  # most tokens that a row may generate now
    before: jax.Array  # tokens that it generated in earlier rounds
    keys: jax.Array
    eos: jax.Array
    sampling: Sampling


@struct.dataclass
class Progress:
    """tokens [B, N], counts [B] of them; stopped [B]: by an end token or from outside."""

    cache: Cache
    tokens: jax.Array
    counts: jax.Array
    stopped: jax.Array


@partial(jax.jit, static_argnames=("room", "mesh"))
def begin(
    pair: Pair,
    request: Request,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    room: int,
    mesh: Mesh | None = None,
) -> Progress:
    """Read the prompts, tokens and mask [B, P], and choose the first new token of each."""
    cache = make_cache(pair, mask, room, steered=request.alpha is not None)
    x, cache = advance(pair, cache, tokens, request.alpha, mesh=mesh)
    last = jnp.maximum(mask.sum(axis=1) - 1, 0)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    rows = tokens.shape[0]
    progress = Progress(
        cache,
        jnp.zeros((rows, room), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
    )
    return emit(pair, request, progress, x)


@partial(jax.jit, static_argnames="mesh", donate_argnames="progress")
def resume(
    pair: Pair, request: Request, progress: Progress, steps: jax.Array, *, mesh: Mesh | None = None
) -> Progress:
    """Decode at most `steps` tokens more, until every row is done."""

    def going(state: tuple[jax.Array, Progress]) -> jax.Array:
        step, progress = state
        return (step < steps) & any_going(request, progress)

    def body(state: tuple[jax.Array, Progress]) -> tuple[jax.Array, Progress]:
        step, progress = state
        x, cache = advance(pair, progress.cache, latest(progress), request.alpha, mesh=mesh)
        return step + 1, emit(pair, request, dataclasses.replace(progress, cache=cache), x)

    return jax.lax.while_loop(going, body, (jnp.int32(0), progress))[1]


def any_going(request: Request, progress: Progress) -> jax.Array:
    """Whether a row has tokens yet to generate."""
    return (~progress.stopped & (progress.counts < request.limits)).any()


def latest(progress: Progress) -> jax.Array:
    """The newest token of each row, [B, 1]."""
    last = jnp.maximum(progress.counts - 1, 0)[:, None]
    return jnp.take_along_axis(progress.tokens, last, axis=1)


def emit(pair: Pair, request: Request, progress: Progress, x: jax.Array) -> Progress:
    """Choose each row's next token from its stream x [B, 1, D]; done rows keep what they have."""
    logits = decoder.logits(pair.tuned_config, pair.tuned_params, x[:, 0], pair.lora)
    counts = progress.counts
    token = choose(logits, request.sampling, request.keys, request.before + counts)
    going = ~progress.stopped & (counts < request.limits)
    ends = (token[:, None] == request.eos).any(axis=1)
    kept = going & ~ends
    column = jnp.arange(progress.tokens.shape[1]) == counts[:, None]
    tokens = jnp.where(column & kept[:, None], token[:, None], progress.tokens)
    return dataclasses.replace(
        progress, tokens=tokens, counts=counts + kept, stopped=progress.stopped | (going & ends)
    )
