"""Decoding with key/value caches along the alpha-scaled stream (TuCo paper, Definition 5.1).

    x_{l+1} = x_l + f_FT + (alpha - 1) FTC        (= x_l + PTC + alpha FTC, exact at alpha = 1)

Both models' blocks run on one residual stream, so there are two caches, of PT's and of FT's keys
and values at the same x_l, each with its own rotary tables, window and epsilon; a cache is valid
for one alpha only.
Embedding, final norm and head are FT's. Where alpha is 1 throughout, PT is not run at all.

Columns of a cache are a prompt's tokens, padded on the right to P, then new tokens: every row
writes its j-th new token in column P + j, at its own position (prompt length + j). Attention masks
by position, so the padding between is never seen. Where prompts begin alike, columns of what they
begin with stand before: read once, and copied to the rows (`lead.py`).

Legend: B batch, P padded prompt length, N room for new tokens, T tokens of one step, D residual
width, V vocabulary, L layers, E end tokens; G, M of a lead.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from common_jax import struct
from common_jax.mesh import constrain
from tuco_jax.core.cache import Cache
from tuco_jax.core.layer import ModelLayer, PairLayer
from tuco_jax.core.places import ModelPlaces, Places
from tuco_jax.core.residual import begin as begin_stream
from tuco_jax.core.walk import Source, walk
from tuco_jax.generation.lead import Lead
from tuco_jax.generation.sampling import Sampling, choose
from tuco_jax.models import decoder
from tuco_jax.models.layers import KeysValues
from tuco_jax.models.pair import Pair

__all__ = ["DecodeStep", "Progress", "Request", "advance", "begin", "resume"]


@struct.dataclass
class DecodeStep:
    """The step of one layer over the next T columns; returns their keys and values.

    own: (alpha, or None for the tuned model alone; the cache of this layer).
    """

    places: Places
    mesh: Mesh | None = struct.field(pytree_node=False)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: PairLayer,
        own: tuple[Float[Array, " B"] | None, Cache],
    ) -> tuple[Float[Array, "B T D"], tuple[KeysValues, ...]]:
        """Move the stream to x + f_FT + (alpha - 1) FTC."""
        alpha, cache = own

        def add(
            model: ModelLayer, at: ModelPlaces, held: KeysValues
        ) -> tuple[jax.Array, KeysValues]:
            delta, new = model.following(x, at, functools.partial(cache.join, held))
            return delta.total, new

        ft, new = add(layer.tuned, self.places.tuned, cache.keys_values[0])
        if alpha is None:
            return constrain(x + ft, self.mesh), (new,)
        pt, base_new = add(layer.base, self.places.base, cache.keys_values[1])
        x = x + ft + (alpha[:, None, None] - 1) * (ft - pt)
        return constrain(x, self.mesh), (new, base_new)


def advance(
    source: Source,
    cache: Cache,
    tokens: Int[Array, "B T"],
    alpha: Float[Array, "L B"] | None,
    *,
    lengths: Int[Array, " B"] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Run the next T columns through all layers.

    alpha: None for the tuned model alone; the one that the cache was filled with. Returns the
    residual stream before the final norm, float32, and the cache with these columns filled.

    LongRoPE and dynamic NTK choose frequencies by the length that a row has now, or by `lengths`;
    keys in the cache stay rotated as they were.
    """
    x, places = _enter(source.ends, cache.bare(), tokens, lengths, mesh=mesh)
    x, cache = walk(DecodeStep(places, mesh), x, source, alpha, cache=cache)
    return x, dataclasses.replace(cache, filled=cache.filled + tokens.shape[1])


@functools.partial(jax.jit, static_argnames="mesh")
def _enter(
    ends: Pair,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None,
    *,
    mesh: Mesh | None,
) -> tuple[Float[Array, "B T D"], Places]:
    """x_0 of the next columns of a cache, and where they stand."""

    def now(a: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a, cache.filled, tokens.shape[1], axis=1)

    index = now(cache.at.index)
    lengths = index[:, -1] + 1 if lengths is None else lengths
    places = Places.after(ends, cache, index, now(cache.at.mask), lengths=lengths)
    return begin_stream(ends, tokens, None, places, mesh), places


@struct.dataclass
class Request:
    """What a batch is to generate.

    alpha: None for the tuned model alone. limits: the most tokens that a row may generate now.
    before: how many it generated in earlier rounds. keys: of the rows' samples. eos: tokens that
    end a row.
    """

    alpha: Float[Array, "L B"] | None
    limits: Int[Array, " B"]
    before: Int[Array, " B"]
    keys: Key[Array, " B"]
    eos: Int[Array, " E"]
    sampling: Sampling


@struct.dataclass
class Progress:
    """What has been generated so far.

    tokens: new ones, of which a row's first `counts` are set. stopped: by an end token, or by the
    caller.
    """

    cache: Cache
    tokens: Int[Array, "B N"]
    counts: Int[Array, " B"]
    stopped: Bool[Array, " B"]


def begin(
    source: Source,
    request: Request,
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    lead: Lead | None = None,
    *,
    room: int,
    mesh: Mesh | None = None,
) -> Progress:
    """Prefill: run the prompts, and choose the first new token of each. room: N.

    lead: what some prompts begin with; tokens and mask are of what follows it, one token at least.
    """
    run = _begin_compiled if source.one_program else _begin
    return run(source, request, tokens, mask, lead, room=room, mesh=mesh)


def resume(
    source: Source, request: Request, progress: Progress, steps: int, *, mesh: Mesh | None = None
) -> Progress:
    """Decode at most `steps` tokens more, or until every row is done.

    `progress` is donated: it cannot be used again.
    """
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
    tokens: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    lead: Lead | None,
    *,
    room: int,
    mesh: Mesh | None,
) -> Progress:
    empty = functools.partial(Cache.empty, source.ends, both=request.alpha is not None)
    if lead is None:
        cache = empty(mask, room)
    else:
        alpha = None if request.alpha is None else request.alpha[:, lead.rows]
        of_lead = empty(lead.mask, 0)
        _, of_lead = advance(source, of_lead, lead.tokens, alpha, lengths=lead.totals, mesh=mesh)
        cache = empty(jnp.concatenate([lead.seen, mask], axis=1), room)
        cache = cache.led_by(of_lead, lead.follows)
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
    """One more token of each row that is not done."""
    latest = _latest(_without_keys(progress))
    x, cache = advance(source, progress.cache, latest, request.alpha, mesh=mesh)
    return _emitted(source, request, dataclasses.replace(progress, cache=cache), x)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="progress")
def _resume_compiled(
    source: Any, request: Request, progress: Progress, steps: Int[Array, ""], *, mesh: Mesh | None
) -> Progress:
    def going(state: tuple[jax.Array, Progress]) -> jax.Array:
        step, progress = state
        return (step < steps) & _any_going(request, progress)

    def body(state: tuple[jax.Array, Progress]) -> tuple[jax.Array, Progress]:
        step, progress = state
        return step + 1, _token(source, request, progress, mesh)

    return jax.lax.while_loop(going, body, (jnp.int32(0), progress))[1]


def _without_keys(progress: Progress) -> Progress:
    """Without keys and values, which small programs would otherwise be passed, and copy."""
    return dataclasses.replace(progress, cache=progress.cache.bare())


def _emitted(
    source: Any, request: Request, progress: Progress, x: Float[Array, "B 1 D"]
) -> Progress:
    done = _emit(source.ends, request, _without_keys(progress), x)
    return dataclasses.replace(done, cache=progress.cache)


@jax.jit
def _any_going(request: Request, progress: Progress) -> Bool[Array, ""]:
    """Whether a row has tokens yet to generate."""
    return (~progress.stopped & (progress.counts < request.limits)).any()


@jax.jit
def _latest(progress: Progress) -> Int[Array, "B 1"]:
    """The newest token of each row."""
    last = jnp.maximum(progress.counts - 1, 0)[:, None]
    return jnp.take_along_axis(progress.tokens, last, axis=1)


@jax.jit
def _emit(pair: Pair, request: Request, progress: Progress, x: Float[Array, "B 1 D"]) -> Progress:
    """Choose each row's next token from its residual stream x; rows that are done stay as is."""
    logits = decoder.logits(pair.tuned_config, pair.tuned_params, x[:, 0], pair.lora)
    counts = progress.counts
    token = choose(logits, request.sampling, request.keys, request.before + counts)
    going = ~progress.stopped & (counts < request.limits)
    ends = (token[:, None] == request.eos[None]).any(axis=1)
    added = going & ~ends
    column = jnp.arange(progress.tokens.shape[1])[None] == counts[:, None]
    tokens = jnp.where(column & added[:, None], token[:, None], progress.tokens)
    counts = counts + added.astype(counts.dtype)
    stopped = progress.stopped | (going & ends)
    return dataclasses.replace(progress, tokens=tokens, counts=counts, stopped=stopped)
