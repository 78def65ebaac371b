"""Rows that follow prefixes, in any engine of rows: what they begin with is computed once.

Prefixes are rows that walk the layers beside the rows that follow them. In each layer both models'
keys and values of the prefixes are handed to the rows behind them and let go of: no layer's are
held but the present one's.

    x [G, P, D]          prefixes, moved as the engine moves its rows (an alpha each, say)
    x [n, B, T, D]       what follows: in n chunks one after another, so that many rows share one
                         pass of the prefixes and memory stays that of B rows

Legend: G prefixes, P tokens of one (padded), n chunks, B rows of a chunk, T tokens of a row, C
last tokens of a row, D residual width, L layers. A row follows one prefix; each of its segments
does so for itself, from any place of the prefix on: of the prefix it sees what comes before, of
other segments nothing. So prompts that grow, each the beginning of the next, follow one prefix.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from common_jax import struct
from tuco_jax.core.cache import Ahead, Cache, LayerCache, each
from tuco_jax.core.engine import Engine, Phase
from tuco_jax.core.layer import PairLayer
from tuco_jax.core.places import Places
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import Positions, spans

__all__ = ["Rows", "RowsStep", "SharedPrefixes", "SharedStep"]


class RowsStep(Protocol):
    """The step of an engine of rows. ahead: of the prefixes that rows follow."""

    places: Places
    ahead: Ahead | None

    def __call__(self, carry: Any, layer: PairLayer, own: Any, /) -> tuple[Any, Any]:
        """One layer of the rows."""
        ...

    def lead(self, x: Any, layer: PairLayer, own: Any, at: Places) -> tuple[Any, LayerCache]:
        """One layer of prefixes that stand `at`: x after it, and both models' keys and values."""
        ...


class Rows(Engine, Protocol):
    """An engine of rows [B, T] whose state is their places.

    axis: of B in the leaves of its carry. What its steps return has B behind the layers' axis.
    """

    axis: int
    tokens: Int[Array, "B T"] | None
    mask: Any
    columns: Any
    segments: Any

    def enter(self, ends: Pair, tokens: Any, places: Places) -> Any:
        """x_0 of some tokens."""
        ...


@struct.dataclass
class SharedStep:
    """The step of one layer. prefixes: their places. rows: the rows' step, places [n, ...].

    follows: the prefix of each row.
    """

    prefixes: Places
    rows: RowsStep
    follows: Int[Array, "n B"]

    def __call__(
        self, carry: tuple[Any, Any], layer: PairLayer, own: Any
    ) -> tuple[tuple[Any, Any], Any]:
        """The prefixes first, as their keys and values are needed; then chunk after chunk."""
        x, rows = carry
        x, seen = self.rows.lead(x, layer, own, self.prefixes)

        def chunk(xs: Any) -> Any:
            places, follows, carry = xs
            step: Any = self.rows
            step = dataclasses.replace(step, places=places, ahead=Ahead(seen, follows))
            return step(carry, layer, own)

        rows, out = jax.lax.map(chunk, (self.rows.places, self.follows, rows))
        return (x, rows), out


@struct.dataclass
class SharedPrefixes:
    """The engine: arrays of the prefixes; and that of the rows, whose first axis may be sharded.

    rows: its tokens, mask and segments (not None) are [B, n, T], its columns [B, n, C]. real: True
    at a prefix's tokens. totals: length of a prompt that begins with it; where rotary frequencies
    depend on lengths, all prompts of a prefix must ask for the same ones. starts: how many of its
    prefix's tokens each token's segment follows. whole: the result is a pair, what became of the
    prefixes and of the rows.
    """

    rows: Rows
    prefixes: Int[Array, "G P"]
    real: Bool[Array, "G P"]
    totals: Int[Array, " G"]
    follows: Int[Array, "B n"]
    starts: Int[Array, "B n T"]
    whole: bool = struct.field(pytree_node=False, default=False)

    def state(self, ends: Pair) -> tuple[Places, Places, Int[Array, "n B"]]:
        """Places of the prefixes, and of the rows by chunks; and each row's prefix."""
        before = Places.of(ends, self.real, lengths=self.totals)

        def of_chunk(mask: Any, segments: Any, columns: Any, follows: Any, starts: Any) -> Places:
            index, lengths = spans(mask, segments)
            earlier = Positions(
                each(before.tuned.query.index, follows), each(self.real, follows), None, None, None
            )
            return Places.after(
                ends,
                Cache((), earlier, jnp.int32(0), shared=True),
                index + starts,
                mask,
                columns=columns,
                segments=segments,
                starts=starts,
                lengths=lengths + starts,
            )

        rows = self.rows.mask, self.rows.segments, self.rows.columns, self.follows, self.starts
        chunks = [a.swapaxes(0, 1) for a in rows]
        return before, jax.vmap(of_chunk)(*chunks), chunks[3]

    def begin(self, ends: Pair, state: tuple[Places, Places, Any]) -> tuple[Any, Any]:
        """x_0 of the prefixes, and the first carry of the rows."""
        before, places, _ = state

        def chunk(xs: Any) -> Any:
            tokens, places = xs
            rows: Any = self.rows
            return dataclasses.replace(rows, tokens=tokens).begin(ends, places)

        assert self.rows.tokens is not None
        rows = jax.lax.map(chunk, (self.rows.tokens.swapaxes(0, 1), places))
        return self.rows.enter(ends, self.prefixes, before), rows

    def phases(self, state: tuple[Places, Places, Any], depth: int) -> list[Phase]:
        """Those of the rows, with the prefixes ahead."""
        before, places, follows = state
        return [
            phase._replace(step=SharedStep(before, phase.step, follows))  # pyright: ignore
            for phase in self.rows.phases(places, depth)
        ]

    def finish(self, ends: Pair, carry: tuple[Any, Any], outs: Sequence[Any]) -> Any:
        """The result of all rows, as of one batch: [B n, ...], a row's chunks side by side.

        With `whole` behind the carry of the prefixes.
        """

        def flat(a: Array, chunks: int, rows: int) -> Array:
            a = jnp.moveaxis(a, chunks, rows + 1)
            return a.reshape(*a.shape[:rows], -1, *a.shape[rows + 2 :])

        rows = jax.tree.map(lambda a: flat(a, 0, self.rows.axis), carry[1])
        found = self.rows.finish(ends, rows, jax.tree.map(lambda a: flat(a, 1, 1), list(outs)))
        return (carry[0], found) if self.whole else found
