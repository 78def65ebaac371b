"""TuCo of last tokens of prompts that begin alike: what they have in common is computed once.

Prefixes are rows that walk the layers beside the rows that follow them. In each layer both models'
keys and values of the prefixes, which stand on the tuned stream as everything does, are handed to
the rows behind them and let go of: no layer's are held but the present one's.

    x [G, P, D]          prefixes: only FT moves them, and nothing of them is asked
    x [n, B, T, D]       what follows: as in `last_token`, in n chunks one after another, so that
                         many rows share one pass of the prefixes and memory stays that of B rows

Legend: G prefixes, P tokens of one (padded), n chunks, B rows of a chunk, T tokens of a row, C
last tokens of a row, D residual width, L layers. A row follows one prefix; each of its segments
does so for itself, and sees no other.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from common_jax.mesh import constrain
from tuco_jax.core.cache import Cache
from tuco_jax.core.engine import Phase
from tuco_jax.core.last_token import Carry, LastToken, LastTokenStep, summed_up
from tuco_jax.core.layer import PairLayer
from tuco_jax.core.places import Places, pick
from tuco_jax.core.residual import begin
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import Positions, spans

__all__ = ["SharedPrefixes", "SharedStep"]

Carries = tuple[Float[Array, "G P D"], Carry]  # of the prefixes; of the rows, leaves [n, B, ...]


@struct.dataclass
class SharedStep:
    """The step of one layer. prefixes: their places. places: of the rows, leaves [n, ...].

    follows: the prefix of each row. full, norm, mesh: as of `LastTokenStep`.
    """

    prefixes: Places
    places: Places
    follows: Int[Array, "n B"]
    full: bool = struct.field(pytree_node=False)
    norm: int = struct.field(pytree_node=False)
    mesh: Mesh | None = struct.field(pytree_node=False)

    def __call__(
        self, carry: Carries, layer: PairLayer, _: None
    ) -> tuple[Carries, Float[Array, "n B C"]]:
        """The prefixes first, as their keys and values are needed; then chunk after chunk."""
        x, rows = carry
        at = self.prefixes
        seen = layer.tuned.keys_values(x, at.tuned), layer.base.keys_values(x, at.base)
        if self.full:
            x = constrain(x + layer.tuned.whole(x, at.tuned).total, self.mesh)

        def chunk(xs: Any) -> Any:
            places, follows, own = xs
            before = jax.tree.map(lambda a: _each(a, follows), seen)
            return LastTokenStep(places, self.full, self.norm, self.mesh, before)(own, layer, None)

        rows, beta = jax.lax.map(chunk, (self.places, self.follows, rows))
        return (x, rows), beta


def _each(of: Shaped[Array, "G ..."], follows: Int[Array, " B"]) -> Shaped[Array, "B ..."]:
    """What each row's prefix has. One prefix is not gathered but spread out."""
    if len(of) == 1:
        return jnp.broadcast_to(of, (len(follows), *of.shape[1:]))
    return of[follows]


@struct.dataclass
class SharedPrefixes:
    """The engine: arrays of the prefixes, and of the rows, whose first axis may be sharded.

    real: True at a prefix's tokens. totals: length of a prompt that begins with it; where rotary
    frequencies depend on lengths, all prompts of a prefix must ask for the same ones. segments:
    None where each row holds one prompt. columns: of each prompt's last token.
    """

    prefixes: Int[Array, "G P"]
    real: Bool[Array, "G P"]
    totals: Int[Array, " G"]
    tokens: Int[Array, "B n T"]
    mask: Bool[Array, "B n T"]
    segments: Int[Array, "B n T"] | None
    columns: Int[Array, "B n C"]
    follows: Int[Array, "B n"]
    norm: int = struct.field(pytree_node=False, default=1)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    def state(self, ends: Pair) -> SharedStep:
        """A full step, with all places."""
        before = Places.of(ends, self.real, lengths=self.totals)
        counts = self.real.sum(axis=1)

        def of_chunk(mask: Any, segments: Any, columns: Any, follows: Any) -> Places:
            index, lengths = spans(mask, segments)
            ahead = counts[follows]
            index_before = _each(before.tuned.query.index, follows)
            earlier = Positions(index_before, _each(self.real, follows), None, None, None)
            cache = Cache((), earlier, jnp.int32(0), shared=True)
            return Places.after(
                ends,
                cache,
                index + ahead[:, None],
                mask,
                columns=columns,
                segments=segments,
                lengths=lengths + (ahead if lengths.ndim == 1 else ahead[:, None]),
            )

        rows = self.mask, self.segments, self.columns, self.follows
        mask, segments, columns, follows = jax.tree.map(lambda a: a.swapaxes(0, 1), rows)
        places = jax.vmap(of_chunk)(mask, segments, columns, follows)
        return SharedStep(before, places, follows, full=True, norm=self.norm, mesh=self.mesh)

    def begin(self, ends: Pair, state: SharedStep) -> Carries:
        """x_0 of the prefixes and of the rows, and at the last tokens; sums at zero."""
        x = begin(ends, self.prefixes, None, state.prefixes, self.mesh)

        def chunk(xs: Any) -> Carry:
            tokens, places = xs
            own = begin(ends, tokens, None, places, self.mesh)
            first = pick(own, places.columns)
            return Carry(own, first, first, (jnp.zeros_like(first),) * 4)

        return x, jax.lax.map(chunk, (self.tokens.swapaxes(0, 1), state.places))

    def phases(self, state: SharedStep, depth: int) -> list[Phase]:
        """The full step up to the last layer, in which of prefixes keys and values are enough."""
        last = dataclasses.replace(state, full=False)
        before = [Phase(state, 0, depth - 1)] if depth > 1 else []
        return [*before, Phase(last, depth - 1, depth)]

    def finish(
        self, ends: Pair, carry: Carries, outs: Sequence[Float[Array, "_ n B C"]]
    ) -> LastToken:
        """The result of all rows, as of one batch: [B n, C], a row's chunks side by side."""

        def flat(a: Array, axis: int = 0) -> Array:
            a = a.swapaxes(axis, axis + 1)
            return a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])

        return summed_up(jax.tree.map(flat, carry[1]), [flat(out, 1) for out in outs])
