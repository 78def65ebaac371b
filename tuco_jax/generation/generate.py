"""Generation along the alpha-scaled stream, FTC_alpha (Definition 5.1 of the TuCo paper).

    x_{l+1} = x_l + f_FT + (alpha - 1) FTC        (= x_l + PTC + alpha FTC, exact at alpha = 1)

`decoding.py` says how one batch is decoded. Embedding, final norm and head are FT's:
alpha = 0 is PT's blocks between FT's embedding and head. Where alpha is 1 throughout, PT is not
run at all.

Legend: N prompts, n tokens of a prompt, m new tokens, L layers, B rows of a batch, P padded prompt
length.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from common_jax.errors import InputError
from common_jax.journal import Section, Sections
from common_jax.mesh import fetch
from tuco_jax.core.tokens import check_row
from tuco_jax.core.walk import Source, source_of
from tuco_jax.generation.decoding import Progress, Request, begin, resume
from tuco_jax.generation.lead import led
from tuco_jax.generation.options import GenerationOptions, check_turns
from tuco_jax.generation.sampling import Sampling, row_keys
from tuco_jax.models.pair import Pair, single
from tuco_jax.models.sharding import mesh_of, put_rows
from tuco_jax.prompts.batching import bucket_length
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.messages import Message
from tuco_jax.prompts.read import Prompt, as_prompts
from tuco_jax.prompts.render import render
from tuco_jax.scoring.fingerprint import tokens_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answered", "Response", "end_tokens", "generate", "generate_tokens", "respond"]

_CHECK_EVERY = 8  # tokens between two checks for a stop text


class Answered(NamedTuple):
    """One batch's new tokens of `rows`, as a journal holds them.

    turn: counts from 0; a row has several where LongRoPE's frequencies change. stopped: rows that
    are not to go on.
    """

    turn: int
    rows: list[int]
    tokens: list[Int[np.ndarray, " m"]]
    stopped: list[bool]

    @classmethod
    def read(cls, record: Any, count: int, vocab_size: int) -> "Answered | None":
        """The entry that a journal holds; None, or an error, where it is none. count: N."""
        turn, rows, tokens, stopped = record
        good = type(turn) is int and all(type(row) is int and 0 <= row < count for row in rows)
        good &= len(rows) == len(tokens) == len(stopped) and {*map(type, stopped)} <= {bool}
        good &= all(type(t) is int and 0 <= t < vocab_size for row in tokens for t in row)
        arrays = [np.asarray(row, np.int32) for row in tokens]
        return cls(turn, rows, arrays, stopped) if good else None


def generate_tokens(
    pair: Pair,
    prompts: Sequence[Int[np.ndarray, " n"]],
    alpha: Any = 1.0,
    *,
    eos: Sequence[int] = (),
    finished: Callable[[Int[np.ndarray, " m"]], bool] | None = None,
    mesh: Mesh | None = None,
    journal: Sections | None = None,
    **options: Any,
) -> list[Int[np.ndarray, " m"]]:
    """New tokens of each prompt, the end token left out: N arrays int32, of unequal lengths.

    Args:
        pair: the two models.
        prompts: N arrays of token ids, none empty.
        alpha: broadcastable to [L, N]: a scalar, [N] per prompt, [L, 1] per layer.
        eos: tokens that end a row.
        finished: called every few tokens with a row's new tokens; True ends the row.
        mesh: rows are sharded over it; by default over the devices that the pair lies on.
        journal: of this pair; batches that it holds are not answered again, and each new one is
            added. What `finished` ends must follow from `stop`, or have a part of its own.
        options: fields of `GenerationOptions`; of texts, and so of no use here, are `stop`
            (`finished` is in its place) and `continue_final`. Row i samples with
            fold_in(key(seed), i), whatever batch it is in.

    What prompts of a batch begin with in common is read once, where that spares a tenth of the
    prefill. Where a row crosses the length at which LongRoPE switches, its prefill is run again,
    so that all its keys have one set of frequencies, as an uncached pass would have. Dynamic NTK
    changes with every token: there, keys keep the frequencies of the length that they were made
    at, as in transformers.

    Raises InputError for an alpha of the wrong shape or not finite, and for a prompt that is empty
    or fills the context.
    """
    how = GenerationOptions(**options)
    sampling = Sampling.of(how.temperature, how.top_k, how.top_p)
    mesh = mesh or mesh_of(pair)
    pair, alphas = _plan(pair, alpha, len(prompts))
    context = pair.tuned_config.max_positions if alphas is None else pair.context
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise InputError(
                f"prompts[{number}]: {len(prompt)} tokens, but the model's context of {context} "
                "wants at least one and room for a new one; shorten the prompt"
            )
    source = source_of(pair, mesh)
    vocab_size = pair.tuned_config.vocab_size
    texts = [check_row(p, vocab_size, f"prompts[{i}]") for i, p in enumerate(prompts)]
    starts = np.asarray([len(t) for t in texts])
    ends = np.minimum(starts + how.max_new_tokens, context)
    section = Section[Answered]()
    if journal:
        read = functools.partial(Answered.read, count=len(texts), vocab_size=vocab_size)
        section = journal.section("answers", _key(texts, alpha, eos, how), read)
    known = {
        (entry.turn, i): (tokens, stop)
        for entry in section.entries
        for i, tokens, stop in zip(entry.rows, entry.tokens, entry.stopped, strict=True)
    }

    def answered(turn: int, rows: Int[np.ndarray, " B"]) -> Answered:
        lengths = np.asarray([len(texts[i]) for i in rows])
        size = min(how.batch_size, 1 << (len(rows) - 1).bit_length())
        kinds = [_kind(pair, alphas, i, len(texts[i])) for i in rows]
        tokens, mask, lead = led([texts[i] for i in rows], size, kinds)
        padded = np.concatenate([rows, np.full(size - len(rows), rows[0])])
        limits = np.zeros(size, np.int32)
        limits[: len(rows)] = [
            min(end - n, _until_switch(pair, n))
            for end, n in zip(ends[rows], lengths.tolist(), strict=True)
        ]
        request = Request(
            alpha=None if alphas is None else jnp.asarray(alphas[:, padded]),
            limits=jnp.asarray(limits),
            before=jnp.asarray([len(texts[i]) - starts[i] for i in padded], jnp.int32),
            keys=row_keys(how.seed, jnp.asarray(padded)),
            eos=jnp.asarray(eos, jnp.int32).reshape(-1),
            sampling=sampling,
        )
        room = bucket_length(int(limits.max()))
        earlier = [texts[i][starts[i] :] for i in rows]
        tokens, mask = put_rows((tokens, mask), mesh)
        begun = begin(source, request, tokens, mask, lead, room=room, mesh=mesh)
        new, stopped = _run(source, request, begun, room, earlier, finished, mesh)
        return Answered(turn, rows.tolist(), new[: len(rows)], stopped[: len(rows)].tolist())

    pending, turn = list(range(len(texts))), 0
    while pending:
        pending.sort(key=lambda i: len(texts[i]), reverse=True)
        still = []
        for first in range(0, len(pending), how.batch_size):
            rows = pending[first : first + how.batch_size]
            # All of a batch or none, unless rows were answered in batches of another size.
            left = [i for i in rows if (turn, i) not in known]
            if left:
                entry = answered(turn, np.asarray(left))
                section.append(entry)
                found = zip(entry.tokens, entry.stopped, strict=True)
                known |= {(turn, i): own for i, own in zip(left, found, strict=True)}
            for i in rows:
                added, stop = known[turn, i]
                texts[i] = np.concatenate([texts[i], added])
                if not stop and len(texts[i]) < ends[i]:
                    still.append(i)
        pending, turn = still, turn + 1
    return [text[n:] for text, n in zip(texts, starts, strict=True)]


def _key(
    texts: Sequence[Int[np.ndarray, " n"]],
    alpha: Any,
    eos: Sequence[int],
    how: GenerationOptions,
) -> str:
    """Of all that answers of a pair depend on."""
    options = dataclasses.asdict(how) | {"stop": how.stops}
    del options["batch_size"]
    scales = np.asarray(alpha, np.float32)
    ends = sorted({int(token) for token in eos})
    return tokens_fingerprint(texts, scales.shape, scales.tobytes(), ends, options)


def _run(
    source: Source,
    request: Request,
    progress: Progress,
    room: int,
    earlier: Sequence[Int[np.ndarray, " m"]],
    finished: Callable[[Int[np.ndarray, " m"]], bool] | None,
    mesh: Mesh | None,
) -> tuple[list[Int[np.ndarray, " m"]], Bool[np.ndarray, " B"]]:
    """One batch to its end: each row's new tokens, and which rows were stopped.

    progress: after the prefill. earlier: what real rows generated in other rounds; the rows beyond
    these are filling.
    """
    limits = np.asarray(request.limits)
    steps = room if finished is None else _CHECK_EVERY
    while True:
        new, counts, stopped = fetch((progress.tokens, progress.counts, progress.stopped))
        stopped = stopped.copy()
        if finished is not None:
            for row, old in enumerate(earlier):
                stopped[row] |= finished(np.concatenate([old, new[row, : counts[row]]]))
            progress = dataclasses.replace(progress, stopped=jnp.asarray(stopped))
        if (stopped | (counts >= limits)).all():
            return [row[:n] for row, n in zip(new, counts, strict=True)], stopped
        progress = resume(source, request, progress, steps, mesh=mesh)


def _plan(pair: Pair, alpha: Any, rows: int) -> tuple[Pair, Float[np.ndarray, "L N"] | None]:
    """The pair to run, and alpha, or None where one model's blocks are enough."""
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
        # PT's blocks between FT's embedding and head are one model: one pass instead of two.
        params = pair.tuned_params | {"layers": pair.base["layers"]}
        lora = {k: v for k, v in pair.lora.items() if k != "layers"}
        return dataclasses.replace(pair, base=params, tuned={}, lora=lora), None
    return pair, alphas


def _kind(pair: Pair, alphas: Float[np.ndarray, "L N"] | None, row: int, length: int) -> Hashable:
    """What is the same for prompts whose keys and values of equal beginnings are the same."""
    ropes = pair.base_config.ropes + pair.tuned_config.ropes
    return *(rope.kind(length) for rope in ropes), alphas is not None and alphas[:, row].tobytes()


def _until_switch(pair: Pair, length: int) -> int:
    """New tokens that a row of `length` may get before LongRoPE's frequencies change."""
    switches = {
        rope.switch
        for config in (pair.base_config, pair.tuned_config)
        for rope in config.ropes
        if rope.long_frequencies and rope.switch >= length
    }
    return min(switches) - length + 1 if switches else 1 << 30


def end_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's EOS and what its chat template ends a turn with."""
    eos = tokenizer.eos_token_id
    ends: set[int] = {eos} if isinstance(eos, int) else set()
    if tokenizer.chat_template:
        marker = "answer"
        turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": marker}]
        try:
            text = render(tokenizer, turns, whole=False)
        except InputError:  # a template may refuse whatever it likes; then EOS has to do
            text = ""
        after = text.rpartition(marker)[2].strip()
        if after:
            first = tokenizer(after, add_special_tokens=False)["input_ids"][0]
            if first in tokenizer.added_tokens_decoder:
                ends.add(first)
    return tuple(sorted(ends))


@dataclasses.dataclass(frozen=True)
class Response:
    """An answer: the prompt's and the answer's token ids, and its text without special tokens.

    Where a stop text ended the answer, `text` is what comes before the stop text, and `tokens`
    are the fewest that hold `text`.
    """

    prompt: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " m"]
    text: str


def generate(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Sequence[Message] | Prompt],
    alpha: Any = 1.0,
    **options: Any,
) -> list[str]:
    """The continuation of each prompt under FTC_alpha scaling, special tokens left out.

    Args:
        pair: the two models.
        tokenizer: the tuned model's.
        prompts: N texts, conversations or Prompts; conversations go through the chat template.
        alpha: broadcastable to [L, N]: a scalar, [N] per prompt, [L, 1] per layer.
        options: fields of `GenerationOptions` (max_new_tokens, temperature, top_k, top_p, seed,
            stop, continue_final, batch_size), and `model`, `mesh` and `journal` of `respond`.

    Raises InputError for bad prompts or settings.
    """
    return [r.text for r in respond(pair, tokenizer, prompts, alpha, **options)]


def respond(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Sequence[Message] | Prompt],
    alpha: Any = 1.0,
    *,
    model: Literal["tuned", "base"] = "tuned",
    mesh: Mesh | None = None,
    journal: Sections | None = None,
    **options: Any,
) -> list[Response]:
    """`generate`, with the tokens of prompts and answers; arguments and errors are the same.

    model: "base" is the plain base model, between its own embedding and head (unlike alpha 0,
    which keeps the tuned model's); alpha must then be 1. mesh: rows are sharded over it; by
    default over the devices that the pair lies on. journal: as of `generate_tokens`.
    """
    if model not in ("tuned", "base"):
        raise InputError(f"model is {model!r}: give 'tuned' or 'base'")
    if model == "base":
        if np.any(np.asarray(alpha) != 1):
            raise InputError("model='base' has no tuning to scale: leave alpha at 1")
        pair = single(pair.base_config, pair.base)
        journal = journal and journal.part("base")
    how = GenerationOptions(**options)
    stops, wanted = how.stops, as_prompts(prompts)
    check_turns(wanted, how.continue_final)
    ids = encode(
        tokenizer,
        wanted,
        vocab_size=pair.tuned_config.vocab_size,
        continue_final=how.continue_final,
    )

    def text(tokens: np.ndarray) -> str:
        return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def finished(tokens: np.ndarray) -> bool:
        written = text(tokens)
        return any(s in written for s in stops)

    new = generate_tokens(
        pair,
        ids,
        alpha,
        eos=end_tokens(tokenizer),
        finished=finished if stops else None,
        mesh=mesh,
        journal=journal,
        **options,
    )
    responses = []
    for prompt, tokens in zip(ids, new, strict=True):
        whole = written = text(tokens)
        for s in stops:
            written = written.partition(s)[0]
        if written != whole:
            count = next(n for n in range(len(tokens) + 1) if text(tokens[:n]).startswith(written))
            tokens = tokens[:count]
        responses.append(Response(prompt, tokens, written))
    return responses
