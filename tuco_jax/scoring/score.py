"""TuCo of prompts: tokenize, pack, score, check.

The device is kept busy: while it computes one batch the host prepares the next, and results are
fetched one batch late.

Legend: N prompts, n tokens of one, L layers, B rows of a batch, T its length, C prompts of a row.
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from common_jax import mesh as mesh_module
from common_jax.errors import InputError
from common_jax.journal import Section, Sections
from common_jax.progress import bar
from tuco_jax.core import engine
from tuco_jax.core.budget import default_budget
from tuco_jax.core.last_token import LastTokens
from tuco_jax.core.tokens import check_row
from tuco_jax.core.walk import Source, as_source, source_of
from tuco_jax.models import sharding
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.messages import Message
from tuco_jax.prompts.packing import Packed, padding
from tuco_jax.prompts.read import Prompt, as_prompts
from tuco_jax.scoring.engine import as_begun, engine_of, planned
from tuco_jax.scoring.fingerprint import tokens_fingerprint
from tuco_jax.scoring.options import ScoringOptions
from tuco_jax.scoring.output import Entry
from tuco_jax.scoring.streamed import stream_entries
from tuco_jax.scoring.watch import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Scores", "closed_turns", "score", "score_tokens"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of N prompts, in the order in which they were given. Floats are float32.

    ids: the prompts' names. tuco: in [0, 1] (Definition 4.3 of arXiv 2506.23423). layers: the last
    token's beta_1 .. beta_L, of the sums up to each layer; the last one is tuco. tokens: lengths.
    telescoping: max |x_L - x_0 - PTC - FTC| / max |x_L|, the rounding error of the decomposition.
    seconds: "compile" (tracing, compiling, or reading the cache), "run", and "first", from the
    start to the first score. shapes: the (B, T) compiled. padding: share of the computed tokens
    that was padding. shared: share of the prompts' tokens that was not computed, since they begin
    as another prompt does. resumed: how many scores came from a journal.
    """

    ids: list[str | int]
    tuco: Float[np.ndarray, " N"]
    layers: Float[np.ndarray, "N L"]
    tokens: Int[np.ndarray, " N"]
    telescoping: Float[np.ndarray, " N"]
    seconds: dict[str, float]
    shapes: list[tuple[int, int]]
    padding: float
    shared: float = 0.0
    resumed: int = 0

    @property
    def preco(self) -> Float[np.ndarray, " N"]:
        """1 - tuco: pre-training's share."""
        return 1 - self.tuco


def score(
    pair: Pair | Source,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Iterable[str | Sequence[Message] | Prompt],
    *,
    mesh: Mesh | None = None,
    progress: bool = False,
    journal: Sections | None = None,
    **options: Any,
) -> Scores:
    """TuCo of each prompt's last token.

    Args:
        pair: the two models; with a mesh they are first sharded over it, unless `load_pair` has
            done so. Or a source of their layers, such as `stream_pair`'s, which reads each while
            others compute, once for many batches.
        tokenizer: the tuned model's.
        prompts: texts (tokenized with the tokenizer's default special tokens), conversations
            (lists of {"role", "content"}, through the chat template, which closes an assistant's
            turn at the end unless continue_final is given) or `Prompt`s.
        mesh: devices to run on, by default those that the pair is on; the batch is sharded over
            data and fsdp.
        progress: show a progress bar on stderr, if that is a terminal.
        journal: of this pair; its scores are not computed again, and each new batch is added.
        options: fields of `ScoringOptions`: norm, token_budget, parallel, truncate,
            continue_final, share_prefixes, passes.

    Scores do not depend on batches, packing, order or devices (1e-5). Raises InputError naming the
    prompt, also where a score is not finite. Warns of assistants' turns that the template closes.
    """
    prompts, how = as_prompts(prompts), ScoringOptions(**options)
    for note in () if how.continue_final else closed_turns(prompts):
        warnings.warn(note, stacklevel=2)
    ends = as_source(pair).ends
    tokens = encode(
        tokenizer,
        prompts,
        max_tokens=ends.context,
        vocab_size=ends.tuned_config.vocab_size,
        truncate=how.truncate,
        continue_final=how.continue_final,
    )
    return score_tokens(
        pair, tokens, prompts, mesh=mesh, progress=progress, journal=journal, **options
    )


def closed_turns(prompts: Sequence[Prompt]) -> list[str]:
    """A note on conversations whose last turn the chat template closes; none where there are none.

    It is told wherever conversations are scored without `continue_final`.
    """
    count = sum(bool(p.messages) and p.messages[-1]["role"] == "assistant" for p in prompts)
    if not count:
        return []
    return [
        f"{count} of {len(prompts)} prompts end with an assistant's turn, which the chat template "
        "closes; continue_final leaves it open"
    ]


def score_tokens(
    pair: Pair | Source,
    tokens: Sequence[Int[np.ndarray, " n"]],
    prompts: Sequence[Prompt],
    *,
    mesh: Mesh | None = None,
    progress: bool = False,
    journal: Sections | None = None,
    **options: Any,
) -> Scores:
    """`score` of prompts that are token ids already, int32.

    prompts: their names, for errors and the result.
    """
    how = ScoringOptions(**options)
    source = as_source(pair)
    vocab_size = source.ends.tuned_config.vocab_size
    tokens = [check_row(t, vocab_size, str(p)) for t, p in zip(tokens, prompts, strict=True)]
    if how.parallel == "jit":
        mesh = mesh or sharding.mesh_of(source.ends)
    how.check(mesh, source.streams)
    if how.parallel == "jit":  # pmap has copies of the stacked layers
        source = source_of(pair, mesh)
    started = time.perf_counter()
    lengths = [row.size for row in tokens]
    run, width = _runner(source, how, mesh)
    budget = how.token_budget or default_budget()
    # pmap splits all that it is given by rows.
    share = how.share_prefixes and how.parallel != "pmap"
    plan = functools.partial(planned, ends=source.ends, budget=budget, multiple=width, share=share)

    depth = source.ends.base_config.depth
    section = Section[Entry]()
    if journal:
        read = functools.partial(Entry.read, shape=(len(tokens), depth))
        section = journal.section("scores", tokens_fingerprint(tokens, how.norm), read)
    results = _Results(len(tokens), depth)
    for entry in section.entries:
        results.keep(entry)
    done = frozenset(results.done)
    batches = as_begun(plan, tokens, results.batches)
    waste = padding(batches, lengths)
    alone = sum(lengths[i] for batch in batches for i in batch.prompts)
    computed = sum(batch.real(lengths) for batch in batches)
    batches = [b for b in batches if not done.issuperset(b.prompts)]

    first = 0.0
    reached = sum(lengths[i] for i in done)
    with bar("scoring", sum(lengths), unit="tokens", start=reached, show=progress) as shown:
        watch = Watch(lengths, done, shown)
        if source.streams:
            entries = stream_entries(source, tokens, batches, how, watch)
        else:
            entries = _entries(run, tokens, batches, watch)
        for entry in entries:
            if not _finite(entry).all():
                _raise_for_prompt(run, tokens, entry, width, prompts)
            section.append(entry)
            results.keep(entry)
            first = first or time.perf_counter() - started
    took = time.perf_counter() - started
    seconds = {"compile": watch.compiling, "run": took - watch.compiling, "first": first}
    return Scores(
        ids=[p.id for p in prompts],
        tuco=results.tuco,
        layers=results.layers,
        tokens=np.asarray(lengths, np.int32),
        telescoping=results.telescoping,
        seconds=seconds,
        shapes=sorted({(b.size, b.length) for b in batches}),
        padding=waste,
        shared=1 - computed / max(alone, 1),
        resumed=len(done),
    )


class _Results:
    """The results of N prompts so far: tuco and telescoping [N], layers [N, L]."""

    def __init__(self, count: int, depth: int) -> None:
        self.tuco, self.telescoping = (np.empty(count, np.float32) for _ in range(2))
        self.layers = np.empty((count, depth), np.float32)
        self.done: set[int] = set()
        self.batches: list[list[int]] = []

    def keep(self, entry: Entry) -> None:
        self.tuco[entry.rows], self.layers[entry.rows] = entry.tuco, entry.layers
        self.telescoping[entry.rows] = entry.telescoping
        self.done.update(entry.rows)
        self.batches.append(entry.rows)


Rows = dict[str, Any]  # of `Packed.arrays`
# tuco, layers and telescoping
Result = tuple[Float[Array, "B C"], Float[Array, "B C L"], Float[Array, "B C"]]
Run = Callable[[Rows], Result]


def _result(norm: int, mesh: Mesh | None, source: Source, rows: Rows) -> Result:
    make = functools.partial(LastTokens, norm=norm, mesh=mesh)
    out = engine.run(engine_of(rows, make), source)
    return out.tuco, jnp.moveaxis(out.layers, 0, -1), out.telescoping


_jitted = jax.jit(_result, static_argnums=(0, 1))


@functools.lru_cache(maxsize=8)
def _pmapped(norm: int, devices: tuple[Any, ...]) -> Callable[..., Result]:
    return mesh_module.pmap(functools.partial(_result, norm, None), devices=devices)


def _runner(source: Source, options: ScoringOptions, mesh: Mesh | None) -> tuple[Run, int]:
    """A function of a batch's arrays that does not wait for the device, and a divisor of B."""
    norm = options.norm
    if options.parallel == "pmap":
        devices = tuple(mesh.devices.flat) if mesh is not None else tuple(jax.local_devices())
        copies = mesh_module.replicate(source, devices)
        mapped = _pmapped(norm, devices)
        return lambda rows: mapped(copies, rows), len(devices)
    run = _jitted if source.one_program else _result
    width = sharding.batch_width(mesh)
    return lambda rows: run(norm, mesh, source, sharding.put_rows(rows, mesh)), width


def _entries(
    run: Run,
    tokens: Sequence[np.ndarray],
    batches: Sequence[Packed],
    watch: Watch,
) -> Iterator[Entry]:
    """Results of each batch, fetched after the next one was sent to the device."""

    def fetched(batch: Packed, result: Result) -> Entry:
        entry = Entry.of(batch, *mesh_module.fetch(result))
        watch.advance(batch)
        return entry

    sent: tuple[Packed, Result] | None = None
    for batch in batches:
        rows = batch.arrays(tokens)
        start = time.perf_counter()
        result = run(rows)
        watch.called(batch.shape, time.perf_counter() - start)
        if sent:
            yield fetched(*sent)
        sent = batch, result
    if sent:
        yield fetched(*sent)


def _finite(entry: Entry) -> Bool[np.ndarray, " b"]:
    return np.isfinite(np.c_[entry.tuco, entry.layers, entry.telescoping]).all(axis=1)


def _raise_for_prompt(
    run: Run, tokens: Sequence[np.ndarray], entry: Entry, width: int, prompts: Sequence[Prompt]
) -> None:
    """Raise InputError for the prompt whose own score is not finite; others in its row suffer."""
    affected = [i for i, good in zip(entry.rows, _finite(entry), strict=True) if not good]
    alone = (Packed(((i,),), width, -(-tokens[i].size // 64) * 64, 1) for i in affected)
    found = (
        batch
        for batch in alone
        if not _finite(Entry.of(batch, *mesh_module.fetch(run(batch.arrays(tokens))))).all()
    )
    culprit = next((batch.prompts[0] for batch in found), affected[0])
    raise InputError(
        f"{prompts[culprit]}: its score is not finite; activations overflow or weights are "
        "damaged: try --dtype float32, or another copy of the weights"
    )
