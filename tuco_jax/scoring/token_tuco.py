"""TuCo of every token of a text, and of every generated token.

    TuCo(l = L, token t) = |FTC_L[t]| / (|PTC_L[t]| + |FTC_L[t]|)     (Definition 4.3 has t = n)

A generated token is chosen from the residual stream at the token before it, so its TuCo is the one
there: what `score` gives for the text up to it. Under an alpha other than 1 both components are
those of the scaled stream that the answer was generated from.

Legend: N texts, n tokens of one, m of them generated, L layers, B rows of a batch, T its length, D
residual width.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common_jax.errors import InputError
from common_jax.journal import Section, Sections
from common_jax.mesh import fetch
from tuco_jax.core.budget import default_budget
from tuco_jax.core.decompose import decompose
from tuco_jax.core.residual import share
from tuco_jax.core.tokens import check_row
from tuco_jax.core.walk import source_of
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import batch_width, mesh_of, put_rows
from tuco_jax.prompts.packing import Packed, pack
from tuco_jax.scoring.engine import as_begun
from tuco_jax.scoring.fingerprint import tokens_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Piece", "TokenEntry", "pieces", "response_tuco", "token_tuco"]


class TokenEntry(NamedTuple):
    """One batch's TuCo of every token of `rows`, as a journal holds it."""

    rows: list[int]
    tuco: list[Float[np.ndarray, " n"]]

    @classmethod
    def read(cls, record: Any, sizes: Sequence[int]) -> "TokenEntry | None":
        """The entry that a journal holds; None, or an error, where it is none. sizes: each n."""
        rows, values = record
        entry = cls(rows, [np.asarray(row, np.float32) for row in values])
        good = all(type(row) is int and 0 <= row < len(sizes) for row in rows)
        good &= [v.shape for v in entry.tuco] == [(sizes[row],) for row in rows]
        return entry if good and all(np.isfinite(v).all() for v in entry.tuco) else None


@jax.jit
def _share(ptc: Float[Array, "B T D"], ftc: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """TuCo of every token: the share of FTC in the sums over all layers at that token."""
    return share(ptc, ftc)


def token_tuco(
    pair: Pair,
    rows: Sequence[Int[np.ndarray, " n"]],
    alpha: Any = 1.0,
    *,
    token_budget: int | None = None,
    journal: Sections | None = None,
) -> list[Float[np.ndarray, " n"]]:
    """TuCo of every token of N rows of token ids, float32.

    alpha: broadcastable to [L, N]. token_budget: tokens of a batch, padding included; by default
    `default_budget()`. journal: of this pair; batches that it holds are not computed again, and
    each new one is added. Raises InputError for an empty row or one beyond the pair's context, and
    where a score is not finite.
    """
    for number, row in enumerate(rows):
        if not 0 < len(row) <= pair.context:
            raise InputError(
                f"rows[{number}]: {len(row)} tokens; give 1 to {pair.context}, what the pair can "
                "read"
            )
    if not rows:
        return []
    alphas = np.broadcast_to(np.asarray(alpha, np.float32), (pair.tuned_config.depth, len(rows)))
    out: list[Float[np.ndarray, " n"]] = [np.empty(0, np.float32)] * len(rows)
    mesh = mesh_of(pair)
    source = source_of(pair, mesh)
    vocab_size = pair.tuned_config.vocab_size
    ids = [check_row(row, vocab_size, f"rows[{i}]") for i, row in enumerate(rows)]
    budget = token_budget or default_budget()
    sizes = [row.size for row in ids]
    section = Section[TokenEntry]()
    if journal:
        read = functools.partial(TokenEntry.read, sizes=sizes)
        section = journal.section("texts", tokens_fingerprint(ids, alphas.tobytes()), read)
    done = {i: v for entry in section.entries for i, v in zip(entry.rows, entry.tuco, strict=True)}
    for i, values in done.items():
        out[i] = values
    width = batch_width(mesh)

    def plan(rows: Sequence[Int[np.ndarray, " n"]]) -> list[Packed]:
        return pack([row.size for row in rows], budget, width, last_tokens=False)

    for batch in as_begun(plan, ids, [entry.rows for entry in section.entries]):
        if done.keys() >= {*batch.prompts}:
            continue
        placed = batch.arrays(ids)
        by_token = np.ones((len(alphas), *placed["tokens"].shape), np.float32)
        for i, row, columns in batch.spans(ids):
            by_token[:, row, columns] = alphas[:, i, None]
        tokens, mask, segments = put_rows(
            (placed["tokens"], placed["mask"], placed["segments"]), mesh
        )
        found = decompose(
            source, tokens, mask, jnp.asarray(by_token), segments=segments, mesh=mesh
        )
        values = fetch(_share(found.ptc, found.ftc))
        for i, row, columns in batch.spans(ids):
            out[i] = values[row, columns]
            if not np.isfinite(out[i]).all():
                raise InputError(
                    f"rows[{i}]: its TuCo is not finite; activations overflow or weights are "
                    "damaged: try --dtype float32, or another copy of the weights"
                )
        section.append(TokenEntry(batch.prompts, [out[i] for i in batch.prompts]))
    return out


def response_tuco(
    pair: Pair,
    prompts: Sequence[Int[np.ndarray, " n"]],
    responses: Sequence[Int[np.ndarray, " m"]],
    alpha: Any = 1.0,
    *,
    token_budget: int | None = None,
    journal: Sections | None = None,
) -> list[Float[np.ndarray, " m"]]:
    """TuCo of each generated token, float32: what `score` gives for all the text before it.

    prompts, responses: N arrays of token ids each, as `generate.respond` gives them; alpha: as
    there; token_budget and journal: as of `token_tuco`.
    """
    rows = [np.concatenate([p, r]) for p, r in zip(prompts, responses, strict=True)]
    values = token_tuco(pair, rows, alpha, token_budget=token_budget, journal=journal)
    return [v[len(p) - 1 : len(v) - 1] for v, p in zip(values, prompts, strict=True)]


class Piece(NamedTuple):
    """The text of one token, or of several that share a character; TuCo and index of the last."""

    text: str
    tuco: float
    position: int


def pieces(
    tokenizer: "PreTrainedTokenizerBase",
    ids: Int[np.ndarray, " n"],
    values: Float[np.ndarray, " n"],
) -> list[Piece]:
    """Texts of tokens with their TuCo; tokens that are parts of one character make one piece."""
    found: list[Piece] = []
    held: list[int] = []
    for position, token in enumerate(ids.tolist()):
        held.append(token)
        text = str(tokenizer.decode(held))
        if text.endswith("\ufffd") and position + 1 < len(ids):
            continue
        found.append(Piece(text, float(values[position]), position))
        held = []
    return found
