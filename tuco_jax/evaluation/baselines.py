"""Simpler scores of a prompt to compare TuCo with: length, perplexity under PT and FT, OutputCo.

What prompts begin with in common is run once, as in `score`.

Legend: N prompts, b prompts of a batch, B its rows, T tokens, C prompts of a row, D residual
width, V vocabulary; G prefixes of P tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from common_jax.errors import InputError
from common_jax.journal import Section, Sections
from common_jax.mesh import fetch
from tuco_jax.core import engine
from tuco_jax.core.budget import default_budget
from tuco_jax.core.places import pick
from tuco_jax.core.residual import share
from tuco_jax.core.trajectories import FinalStreams, Streams
from tuco_jax.core.walk import source_of
from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import batch_width, mesh_of, put_rows
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.prefixes import Behind
from tuco_jax.prompts.read import Message, Prompt, as_prompts
from tuco_jax.scoring.engine import as_begun, engine_of, planned
from tuco_jax.scoring.fingerprint import tokens_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BaselineEntry", "Baselines", "baselines", "baselines_of_tokens"]


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Scores of N prompts.

    length: in tokens. base_perplexity, tuned_perplexity: exp of the mean negative log-probability
    of every token after the first. output_co: |x_L^FT - x_L^PT| / (|x_L^PT| + |x_L^FT - x_L^PT|)
    of the last token's final streams, L1 (section 5.5 of arXiv 2506.23423).
    """

    length: Int[np.ndarray, " N"]
    base_perplexity: Float[np.ndarray, " N"]
    tuned_perplexity: Float[np.ndarray, " N"]
    output_co: Float[np.ndarray, " N"]

    def columns(self) -> dict[str, Shaped[np.ndarray, " N"]]:
        """Each score under its name in reports."""
        return {
            "prompt length": self.length,
            "perplexity, PT": self.base_perplexity,
            "perplexity, FT": self.tuned_perplexity,
            "OutputCo": self.output_co,
        }


class BaselineEntry(NamedTuple):
    """One batch's scores of prompts `rows`, as a journal holds them; see `Baselines`."""

    rows: list[int]
    base_perplexity: Float[np.ndarray, " b"]
    tuned_perplexity: Float[np.ndarray, " b"]
    output_co: Float[np.ndarray, " b"]

    @classmethod
    def read(cls, record: Any, count: int) -> "BaselineEntry | None":
        """The entry that a journal holds; None, or an error, where it is none. count: N."""
        rows, *values = record
        entry = cls(rows, *(np.asarray(v, np.float32) for v in values))
        good = all(type(row) is int and 0 <= row < count for row in rows)
        return entry if good and all(v.shape == (len(rows),) for v in entry[1:]) else None


def baselines(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Sequence[Message] | Prompt],
    *,
    perplexity: bool = True,
    journal: Sections | None = None,
) -> Baselines:
    """Scores of prompts in any form that `score` takes.

    perplexity: False saves its cost and leaves NaN. journal: of this pair; batches that it holds
    are not computed again, and each new one is added. Raises InputError for a prompt beyond the
    context, or of a single token where perplexity is wanted.
    """
    wanted = as_prompts(prompts)
    tokens = encode(
        tokenizer, wanted, max_tokens=pair.context, vocab_size=pair.tuned_config.vocab_size
    )
    return baselines_of_tokens(pair, tokens, wanted, perplexity=perplexity, journal=journal)


def baselines_of_tokens(
    pair: Pair,
    tokens: Sequence[Int[np.ndarray, " T"]],
    prompts: Sequence[Prompt],
    *,
    perplexity: bool = True,
    journal: Sections | None = None,
) -> Baselines:
    """`baselines` of prompts that are token ids already; prompts: their names, for errors."""
    lengths = [len(row) for row in tokens]
    for prompt, length in zip(prompts, lengths, strict=True):
        if perplexity and length < 2:
            raise InputError(f"{prompt}: one token has no perplexity; give two or more")
    found = np.empty((3, len(tokens)), np.float32)
    section = Section[BaselineEntry]()
    if journal:
        read = functools.partial(BaselineEntry.read, count=len(tokens))
        section = journal.section("baselines", tokens_fingerprint(tokens, perplexity), read)
    done: set[int] = set()
    for entry in section.entries:
        found[:, entry.rows] = entry[1:]
        done.update(entry.rows)
    mesh = mesh_of(pair)
    source = source_of(pair, mesh)
    make = functools.partial(FinalStreams, mesh=mesh)
    how: Any = dict(budget=default_budget(), multiple=batch_width(mesh), share=True)
    plan = functools.partial(planned, ends=source.ends, **how)
    for batch in as_begun(plan, tokens, [entry.rows for entry in section.entries]):
        if done.issuperset(batch.prompts):
            continue
        rows = put_rows(batch.arrays(tokens), mesh)
        streams = engine.run(engine_of(rows, make, whole=True), source)
        if not isinstance(batch, Behind):
            streams = None, streams
        values = fetch(_measured(source.ends, *streams, rows, perplexity=perplexity))
        entry = BaselineEntry(batch.prompts, *batch.unpack(values.transpose(1, 2, 0)).T)
        section.append(entry)
        found[:, entry.rows] = entry[1:]
    base, tuned, output_co = found
    return Baselines(np.asarray(lengths), base, tuned, output_co)


@jax.jit(static_argnames="perplexity")
def _measured(
    ends: Pair,
    before: Streams | None,
    streams: Streams,
    rows: dict[str, jax.Array],
    *,
    perplexity: bool,
) -> Float[Array, "3 B C"]:
    """Perplexity under PT and under FT, and OutputCo, of each prompt, from final streams.

    before: those of the prefixes that rows follow.
    """
    columns = _flat(rows["columns"])
    ft, pt = (pick(x, columns) for x in streams)
    by_tuned = by_base = jnp.full(columns.shape, math.nan)
    if perplexity:
        ahead = before or (None, None)
        tuned = ends.tuned_config, ends.tuned_params, ends.lora
        by_tuned = _perplexity(*tuned, ahead[0], streams[0], rows)
        by_base = _perplexity(ends.base_config, ends.base, {}, ahead[1], streams[1], rows)
    return jnp.stack([by_base, by_tuned, share(pt, ft - pt)])


def _flat(a: jax.Array) -> jax.Array:
    """[B, ...] of a batch whose rows may be in chunks."""
    return a.reshape(-1, a.shape[-1])


def _perplexity(
    config: ModelConfig,
    params: Params,
    lora: Params,
    before: Float[Array, "G P D"] | None,
    x: Float[Array, "B T D"],
    rows: dict[str, jax.Array],
) -> Float[Array, "B C"]:
    """One model's, of each prompt, from its final streams."""

    def nll(stream: Float[Array, "T D"], targets: Int[Array, " T"]) -> Float[Array, " T"]:
        # A token that only the tuned vocabulary has takes the base's last row, as in the stream.
        known = jnp.minimum(targets, config.vocab_size - 1)[:, None]
        logits = decoder.logits(config, params, stream, lora)
        chosen = jnp.take_along_axis(logits, known, axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen

    columns = _flat(rows["columns"])

    def row(xs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        segments, earlier = xs["segments"], jnp.roll(xs["x"], 1, axis=0)
        foretold = (segments == jnp.roll(segments, 1)).at[0].set(False)  # by the token before it
        if before is not None:
            last = before[xs["follows"]][jnp.maximum(xs["starts"] - 1, 0)]
            earlier = jnp.where(foretold[:, None], earlier, last)
            foretold |= xs["starts"] > 0
        own = segments[None] == 1 + jnp.arange(columns.shape[1])[:, None]
        own &= foretold[None]
        total = jnp.sum(jnp.where(own, nll(earlier, xs["tokens"])[None], 0), axis=1)
        return total, own.sum(axis=1)

    given = {name: _flat(rows[name]) for name in ("tokens", "segments")} | {"x": x}
    if before is not None:
        given |= {"follows": rows["follows"].reshape(-1), "starts": _flat(rows["starts"])}
    total, count = jax.lax.map(row, given)  # a row at a time: logits are [T, V]
    if before is not None:
        by_token = jax.lax.map(lambda xs: nll(xs[0][:-1], xs[1][1:]), (before, rows["prefixes"]))
        so_far = jnp.cumsum(by_token, axis=1)
        so_far = jnp.pad(so_far, ((0, 0), (2, 0)))  # of the first 0, 1, 2 ... tokens
        starts = jnp.take_along_axis(given["starts"], columns, axis=1)
        total += so_far[given["follows"][:, None], starts]
        count += jnp.maximum(starts - 1, 0)
    return jnp.exp(total / jnp.maximum(count, 1).astype(total.dtype))
