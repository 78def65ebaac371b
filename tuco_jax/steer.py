"""Generation along the alpha-scaled stream, FTC_alpha (Definition 5.1 of the TuCo paper).

    x_{l+1} = x_l + f_FT + (alpha - 1) FTC        (= x_l + PTC + alpha FTC, exact at alpha = 1)

Both models' blocks run on one stream, so there are two key/value caches, PT's and FT's weights
applied to the same x_l, each with its own rotary tables, window and epsilon; they hold for one
alpha only. Embedding, final norm and head are FT's: alpha = 0 is PT's blocks between FT's ends.
Where alpha is 1 throughout, PT is not run at all.

Columns of a cache are a prompt's tokens, padded on the right to P, then new tokens: every row
writes its j-th new token in column P + j, at its own position (prompt length + j). Attention goes
by positions, so the gap between is never seen.

Legend: B batch, P padded prompt length, N room for new tokens, S = P + N columns, T tokens given
at once, D residual width, V vocabulary, L layers, K key/value heads, h head width, M models run
(1 or 2, the tuned one first).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from transformers import PreTrainedTokenizerBase

from common_jax.errors import InputError
from tuco_jax.batching import Batch, pad
from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, merge, variables
from tuco_jax.models.layers import Block, Positions, layer_infos
from tuco_jax.pair import Pair
from tuco_jax.prompts import Message, Prompt, as_prompts, encode
from tuco_jax.sampling import Sampling, choose, row_keys

__all__ = [
    "Cache",
    "advance",
    "end_tokens",
    "generate",
    "generate_tokens",
    "make_cache",
    "single",
]

_GREEDY = Sampling()
_LOOK_EVERY = 8  # tokens between two looks for a stop text


@struct.dataclass
class Cache:
    """What the blocks have seen. `filled` is the number of columns written so far.

    keys_values: M pairs of [L, B, S, K, h]. index [B, S] int, each column's position; mask [B, S]
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
        shape = (config.depth, *mask.shape, config.kv_heads, config.head_dim)
        dtype = params["layers"]["attention"]["k"]["kernel"].dtype
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    return Cache(tuple(empty(*m) for m in models), index, mask, jnp.int32(0))


def advance(
    pair: Pair, cache: Cache, tokens: jax.Array, alpha: jax.Array | None
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
    tuned_block, base_block = Block(pair.tuned_config), Block(pair.base_config)
    # Merged inside the scan where both run, so that what an adapter shares with its base is one
    # operand, and products with it are computed once.
    params, changed = pair.base["layers"], pair.tuned.get("layers", {})
    if alpha is None:
        params, changed = pair.tuned_params["layers"], {}

    def add(block, weights, x, query, info, held):
        new = block.apply(weights, x, query, info, method="keys_values")
        keys_values = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, one, cache.filled, axis=1)
            for old, one in zip(held, new, strict=True)
        )
        return block.apply(weights, x, keys_values, query, key, info, method="delta").total, new

    def body(x, xs):
        base, changed, lora, base_info, tuned_info, alpha, held = xs
        tuned = variables(merge(base, changed), lora)
        ft, tuned_new = add(tuned_block, tuned, x, at_tuned, tuned_info, held[0])
        if alpha is None:
            return x + ft, (tuned_new,)
        pt, base_new = add(base_block, {"params": base}, x, at_base, base_info, held[1])
        return x + ft + (alpha[:, None, None] - 1) * (ft - pt), (tuned_new, base_new)

    x = decoder.embed(pair.tuned_config, pair.tuned_params, tokens, at_tuned)
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
        lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, cache.filled, axis=2),
        cache.keys_values,
        new,
    )
    return x, cache.replace(keys_values=keys_values, filled=cache.filled + columns)


@struct.dataclass
class _Request:
    """What a batch asks for. alpha [L, B] or None; the others [B], but eos [E]."""

    alpha: jax.Array | None
    limits: jax.Array  # most tokens that a row may generate now
    before: jax.Array  # tokens that it generated in earlier rounds
    keys: jax.Array
    eos: jax.Array
    sampling: Sampling


@struct.dataclass
class _Progress:
    """tokens [B, N], counts [B] of them; stopped [B]: by an end token or from outside."""

    cache: Cache
    tokens: jax.Array
    counts: jax.Array
    stopped: jax.Array


def _emit(request: _Request, progress: _Progress, logits: jax.Array) -> _Progress:
    """Choose each row's next token; rows that are done keep what they have."""
    counts = progress.counts
    token = choose(logits, request.sampling, request.keys, request.before + counts)
    going = ~progress.stopped & (counts < request.limits)
    ends = (token[:, None] == request.eos).any(axis=1)
    kept = going & ~ends
    column = jnp.arange(progress.tokens.shape[1]) == counts[:, None]
    tokens = jnp.where(column & kept[:, None], token[:, None], progress.tokens)
    return progress.replace(
        tokens=tokens, counts=counts + kept, stopped=progress.stopped | (going & ends)
    )


@partial(jax.jit, static_argnames="room")
def _begin(
    pair: Pair, request: _Request, tokens: jax.Array, mask: jax.Array, *, room: int
) -> _Progress:
    """Read the prompts, tokens and mask [B, P], and choose the first new token of each."""
    cache = make_cache(pair, mask, room, steered=request.alpha is not None)
    x, cache = advance(pair, cache, tokens, request.alpha)
    last = jnp.maximum(mask.sum(axis=1) - 1, 0)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    logits = decoder.logits(pair.tuned_config, pair.tuned_params, x, pair.lora)[:, 0]
    rows = tokens.shape[0]
    progress = _Progress(
        cache,
        jnp.zeros((rows, room), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
    )
    return _emit(request, progress, logits)


@partial(jax.jit, donate_argnames="progress")
def _continue(pair: Pair, request: _Request, progress: _Progress, steps: jax.Array) -> _Progress:
    """Decode at most `steps` tokens more, until every row is done."""

    def going(state: tuple[jax.Array, _Progress]) -> jax.Array:
        step, progress = state
        open_rows = ~progress.stopped & (progress.counts < request.limits)
        return (step < steps) & open_rows.any()

    def body(state: tuple[jax.Array, _Progress]) -> tuple[jax.Array, _Progress]:
        step, progress = state
        last = jnp.maximum(progress.counts - 1, 0)[:, None]
        token = jnp.take_along_axis(progress.tokens, last, axis=1)
        x, cache = advance(pair, progress.cache, token, request.alpha)
        logits = decoder.logits(pair.tuned_config, pair.tuned_params, x[:, 0], pair.lora)
        return step + 1, _emit(request, progress.replace(cache=cache), logits)

    return jax.lax.while_loop(going, body, (jnp.int32(0), progress))[1]


def generate_tokens(
    pair: Pair,
    prompts: Sequence[np.ndarray],
    alpha: Any = 1.0,
    *,
    max_new_tokens: int = 64,
    eos: Sequence[int] = (),
    sampling: Sampling = _GREEDY,
    seed: int = 0,
    batch_size: int = 32,
    finished: Callable[[np.ndarray], bool] | None = None,
) -> list[np.ndarray]:
    """New tokens of each prompt, the end token left out: N arrays int32, of unequal lengths.

    Args:
        pair: the two models.
        prompts: N arrays of token ids, each [1 or more].
        alpha: broadcastable to [L, N]: a scalar, [N] per prompt, [L, 1] per layer.
        max_new_tokens: the most tokens to generate; fewer where the model's context ends.
        eos: tokens that end a row.
        sampling: greedy by default.
        seed: row i samples with fold_in(key(seed), i), whatever batch it is in.
        batch_size: rows run at once, prompts sorted by length.
        finished: asked every few tokens with a row's new tokens; True ends the row.

    Where a row crosses the length at which LongRoPE switches, it is read again from its start, so
    that all its keys have one table, as an uncached pass would have. Dynamic NTK changes with
    every token: there, keys keep the frequencies of the length that they were made at, as in
    transformers.

    Raises InputError for an alpha of the wrong shape or a prompt that leaves no room.
    """
    pair, alphas = _plan(pair, alpha, len(prompts))
    if max_new_tokens < 1 or batch_size < 1:
        raise InputError("max_new_tokens and batch_size must be positive")
    context = pair.tuned_config.max_positions
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise InputError(
                f"prompts[{number}]: {len(prompt)} tokens, but the model's context of {context} "
                "wants at least one and room for a new one; shorten the prompt"
            )
    texts = [np.asarray(p, np.int32) for p in prompts]
    starts = np.asarray([len(t) for t in texts])
    ends = np.minimum(starts + max_new_tokens, context)
    pending = list(range(len(texts)))
    while pending:
        pending.sort(key=lambda i: len(texts[i]), reverse=True)
        still = []
        for first in range(0, len(pending), batch_size):
            rows = np.asarray(pending[first : first + batch_size])
            lengths = np.asarray([len(texts[i]) for i in rows])
            size = min(batch_size, 1 << (len(rows) - 1).bit_length())
            batch = Batch(tuple(rows.tolist()), size, _bucket(int(lengths.max())))
            padded = np.concatenate([rows, np.full(size - len(rows), rows[0])])
            limits = np.zeros(size, np.int32)
            limits[: len(rows)] = [
                min(end - n, _until_switch(pair, n))
                for end, n in zip(ends[rows], lengths.tolist(), strict=True)
            ]
            request = _Request(
                alpha=None if alphas is None else jnp.asarray(alphas[:, padded]),
                limits=jnp.asarray(limits),
                before=jnp.asarray([len(texts[i]) - starts[i] for i in padded], jnp.int32),
                keys=row_keys(seed, jnp.asarray(padded)),
                eos=jnp.asarray(eos, jnp.int32).reshape(-1),
                sampling=sampling,
            )
            room = _bucket(int(limits.max()))
            done = None
            if finished is not None:
                # Only what this call generated is text to be searched.
                done = [partial(_tail_finished, finished, texts[i][starts[i] :]) for i in rows]
            new, stopped = _run(pair, request, *pad(texts, batch), room, done)
            for i, tokens, stop in zip(rows.tolist(), new, stopped, strict=False):
                texts[i] = np.concatenate([texts[i], tokens])
                if not stop and len(texts[i]) < ends[i]:
                    still.append(i)
        pending = still
    return [text[n:] for text, n in zip(texts, starts, strict=True)]


def _tail_finished(
    finished: Callable[[np.ndarray], bool], before: np.ndarray, new: np.ndarray
) -> bool:
    return finished(np.concatenate([before, new]))


def _run(
    pair: Pair,
    request: _Request,
    tokens: np.ndarray,
    mask: np.ndarray,
    room: int,
    finished: Sequence[Callable[[np.ndarray], bool]] | None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """One batch to its end: each row's new tokens, and which rows were stopped [B]."""
    progress = _begin(pair, request, tokens, mask, room=room)
    if finished is None:
        progress = _continue(pair, request, progress, jnp.int32(room))
    else:
        while True:
            new, counts = np.asarray(progress.tokens), np.asarray(progress.counts)
            stopped = np.array(progress.stopped)
            for row, is_finished in enumerate(finished):
                stopped[row] |= is_finished(new[row, : counts[row]])
            progress = progress.replace(stopped=jnp.asarray(stopped))
            if (stopped | (counts >= np.asarray(request.limits))).all():
                break
            progress = _continue(pair, request, progress, jnp.int32(_LOOK_EVERY))
    counts = np.asarray(progress.counts)
    new = [row[:n] for row, n in zip(np.asarray(progress.tokens), counts, strict=True)]
    return new, np.asarray(progress.stopped)


def _plan(pair: Pair, alpha: Any, rows: int) -> tuple[Pair, np.ndarray | None]:
    """The pair to run and alpha as [L, N], or None where one model's blocks are enough."""
    depth = pair.tuned_config.depth
    try:
        alphas = np.broadcast_to(np.asarray(alpha, np.float32), (depth, rows))
    except ValueError as error:
        raise InputError(
            f"alpha has shape {list(np.shape(alpha))}: give a number, [{rows}] (one a prompt), "
            f"[{depth}, 1] (one a layer) or [{depth}, {rows}]"
        ) from error
    if not np.isfinite(alphas).all():
        raise InputError("alpha holds NaN or infinity: give finite numbers")
    if (alphas == 1).all():
        return pair, None
    if not alphas.any() and pair.base_config == pair.tuned_config:
        # PT's blocks between FT's ends are a model, too, and cost one pass instead of two.
        params = pair.tuned_params | {"layers": pair.base["layers"]}
        lora = {k: v for k, v in pair.lora.items() if k != "layers"}
        return pair.replace(base=params, tuned={}, lora=lora), None
    return pair, alphas


def _bucket(tokens: int) -> int:
    """Room for `tokens`: few sizes, since each is compiled; a third or less is padding."""
    step = 16 if tokens <= 32 else max(32, 1 << (tokens.bit_length() - 3))
    return -(-tokens // step) * step


def _until_switch(pair: Pair, length: int) -> int:
    """New tokens that a row of `length` may get before a LongRoPE table changes."""
    switches = {
        rope.switch
        for config in (pair.base_config, pair.tuned_config)
        for rope in config.ropes
        if rope.long_frequencies and rope.switch >= length
    }
    return min(switches) - length + 1 if switches else 1 << 30


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's EOS and what its chat template ends a turn with."""
    ends = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        marker = "answer"
        turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": marker}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # a template may refuse whatever it likes; then EOS has to do
            text = ""
        after = text.rpartition(marker)[2].strip()
        if after:
            first = tokenizer(after, add_special_tokens=False)["input_ids"][0]
            if first in tokenizer.added_tokens_decoder:
                ends.add(first)
    return tuple(sorted(ends))


def generate(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message] | Prompt],
    alpha: Any = 1.0,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    batch_size: int = 32,
    model: Literal["tuned", "base"] = "tuned",
) -> list[str]:
    """The continuation of each prompt under FTC_alpha scaling, special tokens left out.

    Args:
        pair: the two models.
        tokenizer: the tuned model's.
        prompts: N texts, conversations or Prompts; conversations go through the chat template.
        alpha: broadcastable to [L, N]: a scalar, [N] per prompt, [L, 1] per layer.
        max_new_tokens: the most tokens to generate; fewer where the model's context ends.
        temperature: 0 takes the most likely token.
        top_k: sample among the top_k likeliest tokens; 0: all.
        top_p: of those, among the fewest whose probabilities reach top_p.
        seed: of the samples. A prompt's sample depends on the seed and its place in `prompts`.
        stop: texts at which an answer ends; they are left out.
        batch_size: rows run at once. Both caches take M x 2 x L x B x S x K x h numbers.
        model: "base" is the plain base model, between its own embedding and head (unlike alpha 0,
            which keeps the tuned model's); alpha must then be 1.

    Raises InputError for bad prompts or settings.
    """
    if model not in ("tuned", "base"):
        raise InputError(f"model is {model!r}: give 'tuned' or 'base'")
    if model == "base":
        if np.any(np.asarray(alpha) != 1):
            raise InputError("model='base' has no tuning to scale: leave alpha at 1")
        pair = single(pair.base_config, pair.base)
    sampling = Sampling.of(temperature, top_k, top_p)
    stops = [stop] if isinstance(stop, str) else list(stop)
    if "" in stops:
        raise InputError("stop holds an empty text: remove it")
    ids = encode(tokenizer, as_prompts(prompts), vocab_size=pair.tuned_config.vocab_size)

    def text(tokens: np.ndarray) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def finished(tokens: np.ndarray) -> bool:
        written = text(tokens)
        return any(s in written for s in stops)

    new = generate_tokens(
        pair,
        ids,
        alpha,
        max_new_tokens=max_new_tokens,
        eos=end_tokens(tokenizer),
        sampling=sampling,
        seed=seed,
        batch_size=batch_size,
        finished=finished if stops else None,
    )
    texts = [text(tokens) for tokens in new]
    for s in stops:
        texts = [t.partition(s)[0] for t in texts]
    return texts


def single(config: ModelConfig, params: Params, lora: Params | None = None) -> Pair:
    """One model as a pair whose tuning is nothing: at alpha 1, `generate` runs it alone."""
    return Pair(params, {}, lora or {}, config, config)
