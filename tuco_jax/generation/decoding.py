"""Decoding with key/value caches along the alpha-scaled stream (TuCo paper, Definition 5.1).

    x_{l+1} = x_l + f_FT + (alpha - 1) FTC        (= x_l + PTC + alpha FTC, exact at alpha = 1)

Both models' blocks run on one stream, so there are two caches, PT's and FT's weights applied to
the same x_l, each with its own rotary tables, window and epsilon; they hold for one alpha only.
Embedding, final norm and head are FT's. Where alpha is 1 throughout, PT is not run at all.

Columns of a cache are a prompt's tokens, padded on the right to P, then new tokens: every row
writes its j-th new token in column P + j, at its own position (prompt length + j). Attention goes
by positions, so the gap between is never seen.

Legend: B batch, P padded prompt length, N room for new tokens, S = P + N columns, T tokens given
at once, D residual width, V vocabulary, L layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from tuco_jax.core.cache import Cache, Held
from tuco_jax.core.layer import Half, PairLayer
from tuco_jax.core.places import At, Places
from tuco_jax.core.stream import begin as begin_stream
from tuco_jax.core.walk import Source, walk
from tuco_jax.generation.sampling import Sampling, choose
from tuco_jax.models import decoder
from tuco_jax.models.layers import KeysValues
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import constrain

__all__ = ["DecodeStep", "Progress", "Request", "advance", "begin", "resume"]


@struct.dataclass
class DecodeStep:
    """One layer over the columns given now, x [B, T, D]; returns their keys and values.

    own: (alpha [B] or None for the tuned model alone, `Held` of the layer). cache: without its
    keys and values.
    """

    places: Places
    cache: Cache
    mesh: Mesh | None = struct.field(pytree_node=False)

    def __call__(
        self, x: jax.Array, layer: PairLayer, own: tuple[jax.Array | None, Held]
    ) -> tuple[jax.Array, tuple[KeysValues, ...]]:
        """X + f_FT + (alpha - 1) FTC."""
        alpha, held = own

        def add(half: Half, at: At, held: KeysValues) -> tuple[jax.Array, KeysValues]:
            delta, new = half.following(x, at, functools.partial(self.cache.join, held))
            return delta.total, new

        ft, new = add(layer.tuned, self.places.tuned, held[0])
        if alpha is None:
            return constrain(x + ft, self.mesh), (new,)
        pt, base_new = add(layer.base, self.places.base, held[1])
        x = x + ft + (alpha[:, None, None] - 1) * (ft - pt)
        return constrain(x, self.mesh), (new, base_new)


def advance(
    source: Source,
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
    bare = cache.bare()
    x, places = _enter(source.ends, bare, tokens, mesh=mesh)
    x, cache = walk(DecodeStep(places, bare, mesh), x, source, alpha, cache=cache)
    return x, dataclasses.replace(cache, filled=cache.filled + tokens.shape[1])


@functools.partial(jax.jit, static_argnames="mesh")
def _enter(
    ends: Pair, cache: Cache, tokens: jax.Array, *, mesh: Mesh | None
) -> tuple[jax.Array, Places]:
    """x_0 [B, T, D] of the next columns of a cache, and where they stand."""

    def now(a: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a, cache.filled, tokens.shape[1], axis=1)

    index = now(cache.at.index)
    places = Places.after(ends, cache.at, index, now(cache.at.mask), lengths=index[:, -1] + 1)
    return begin_stream(ends, tokens, None, places, mesh), places


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


def begin(
    source: Source,
    request: Request,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    room: int,
    mesh: Mesh | None = None,
) -> Progress:
    """Read the prompts, tokens and mask [B, P], and choose the first new token of each."""
    run = _begin_compiled if source.one_program else _begin
    return run(source, request, tokens, mask, room=room, mesh=mesh)


def resume(
    source: Source, request: Request, progress: Progress, steps: int, *, mesh: Mesh | None = None
) -> Progress:
    """Decode at most `steps` tokens more, until every row is done. `progress` is used up."""
    if source.one_program:
        return _resume_compiled(source, request, progress, jnp.int32(steps), mesh=mesh)
    for _ in range(steps):
        if not bool(_any_going(request, _without_keys(progress))):
            break
        progress = _token(source, request, progress, mesh)
    return progress


def _begin(
    source: Any,
    request: Request,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    room: int,
    mesh: Mesh | None,
) -> Progress:
    both = request.alpha is not None
    cache = Cache.empty(source.ends, mask, room, both=both, dtype=source.dtype)
    x, cache = advance(source, cache, tokens, request.alpha, mesh=mesh)
    rows = tokens.shape[0]
    progress = Progress(
        cache,
        jnp.zeros((rows, room), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
    )
    last = jnp.maximum(mask.sum(axis=1) - 1, 0)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    return _emitted(source, request, progress, x)


_begin_compiled = jax.jit(_begin, static_argnames=("room", "mesh"))


def _token(source: Any, request: Request, progress: Progress, mesh: Mesh | None) -> Progress:
    """One token more of each row that goes on."""
    latest = _latest(_without_keys(progress))
    x, cache = advance(source, progress.cache, latest, request.alpha, mesh=mesh)
    return _emitted(source, request, dataclasses.replace(progress, cache=cache), x)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="progress")
def _resume_compiled(
    source: Any, request: Request, progress: Progress, steps: jax.Array, *, mesh: Mesh | None
) -> Progress:
    def going(state: tuple[jax.Array, Progress]) -> jax.Array:
        step, progress = state
        return (step < steps) & _any_going(request, progress)

    def body(state: tuple[jax.Array, Progress]) -> tuple[jax.Array, Progress]:
        step, progress = state
        return step + 1, _token(source, request, progress, mesh)

    return jax.lax.while_loop(going, body, (jnp.int32(0), progress))[1]


def _without_keys(progress: Progress) -> Progress:
    """All that small programs need: keys and values are neither copied nor passed."""
    return dataclasses.replace(progress, cache=progress.cache.bare())


def _emitted(source: Any, request: Request, progress: Progress, x: jax.Array) -> Progress:
    done = _emit(source.ends, request, _without_keys(progress), x)
    return dataclasses.replace(done, cache=progress.cache)


@jax.jit
def _any_going(request: Request, progress: Progress) -> jax.Array:
    """Whether a row has tokens yet to generate."""
    return (~progress.stopped & (progress.counts < request.limits)).any()


@jax.jit
def _latest(progress: Progress) -> jax.Array:
    """The newest token of each row, [B, 1]."""
    last = jnp.maximum(progress.counts - 1, 0)[:, None]
    return jnp.take_along_axis(progress.tokens, last, axis=1)


@jax.jit
def _emit(pair: Pair, request: Request, progress: Progress, x: jax.Array) -> Progress:
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
