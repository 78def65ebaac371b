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

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, merge, variables
from tuco_jax.models.layers import Positions, block_delta, block_keys_values, layer_infos
from tuco_jax.models.sharding import constrain
from tuco_jax.pair import Pair
from tuco_jax.sampling import Sampling, choose

__all__ = ["Cache", "Progress", "Request", "advance", "begin", "make_cache", "resume"]


@struct.dataclass
class Cache:
    """What the blocks have seen. `filled` is the number of columns written so far.

    keys_values: M pairs of [L, B, K, S, h]. index [B, S] int, each column's position; mask [B, S]
    bool, False at padding. A column not yet written has a later position than any query.
    """

    keys_values: tuple[tuple[jax.Array, jax.Array], ...]
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
    columns = tokens.shape[1]

    def now(a: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a, cache.filled, columns, axis=1)

    index = now(cache.index)
    lengths = index[:, -1] + 1
    key = Positions(cache.index, cache.mask, None, None, None)
    at_tuned, at_base = (
        Positions.at(config, index, now(cache.mask), None, lengths)
        for config in (pair.tuned_config, pair.base_config)
    )
    # Merged inside the scan where both run, so that what an adapter shares with its base is one
    # operand, and products with it are computed once.
    params, changed = pair.base["layers"], pair.tuned.get("layers", {})
    if alpha is None:
        params, changed = pair.tuned_params["layers"], {}

    def add(config, weights, x, query, info, held):
        new = block_keys_values(config, weights, x, query, info)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, one, cache.filled, axis=2)
            for old, one in zip(held, new, strict=True)
        )
        return block_delta(config, weights, x, (keys, values), query, key, info).total, new

    def body(x, xs):
        base, changed, lora, base_info, tuned_info, alpha, held = xs
        tuned = variables(merge(base, changed), lora)
        ft, tuned_new = add(pair.tuned_config, tuned, x, at_tuned, tuned_info, held[0])
        if alpha is None:
            return constrain(x + ft, mesh), (tuned_new,)
        pt, base_new = add(pair.base_config, {"params": base}, x, at_base, base_info, held[1])
        x = x + ft + (alpha[:, None, None] - 1) * (ft - pt)
        return constrain(x, mesh), (tuned_new, base_new)

    x = decoder.embed(pair.tuned_config, pair.tuned_params, tokens, at_tuned)
    x = constrain(x, mesh)
    xs = (
        params,
        changed,
        pair.lora.get("layers", {}),
        layer_infos(pair.base_config),
        layer_infos(pair.tuned_config),
        alpha,
        cache.keys_values,
    )
    x, new = jax.lax.scan(body, x, xs)
    # Written after the scan, which only reads the cache: one update in place, all layers at once.
    keys_values = jax.tree.map(
        lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, cache.filled, axis=3),
        cache.keys_values,
        new,
    )
    return x, dataclasses.replace(cache, keys_values=keys_values, filled=cache.filled + columns)


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


def _emit(request: Request, progress: Progress, logits: jax.Array) -> Progress:
    """Choose each row's next token; rows that are done keep what they have."""
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
    logits = decoder.logits(pair.tuned_config, pair.tuned_params, x, pair.lora)[:, 0]
    rows = tokens.shape[0]
    progress = Progress(
        cache,
        jnp.zeros((rows, room), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
    )
    return _emit(request, progress, logits)


@partial(jax.jit, static_argnames="mesh", donate_argnames="progress")
def resume(
    pair: Pair, request: Request, progress: Progress, steps: jax.Array, *, mesh: Mesh | None = None
) -> Progress:
    """Decode at most `steps` tokens more, until every row is done."""

    def going(state: tuple[jax.Array, Progress]) -> jax.Array:
        step, progress = state
        open_rows = ~progress.stopped & (progress.counts < request.limits)
        return (step < steps) & open_rows.any()

    def body(state: tuple[jax.Array, Progress]) -> tuple[jax.Array, Progress]:
        step, progress = state
        last = jnp.maximum(progress.counts - 1, 0)[:, None]
        token = jnp.take_along_axis(progress.tokens, last, axis=1)
        x, cache = advance(pair, progress.cache, token, request.alpha, mesh=mesh)
        logits = decoder.logits(pair.tuned_config, pair.tuned_params, x[:, 0], pair.lora)
        return step + 1, _emit(request, dataclasses.replace(progress, cache=cache), logits)

    return jax.lax.while_loop(going, body, (jnp.int32(0), progress))[1]
