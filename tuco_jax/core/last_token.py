"""TuCo of last tokens, exactly, for the cost of about one forward pass.

    TuCo = |FTC_L[n]| / (|PTC_L[n]| + |FTC_L[n]|)     (Definition 4.3 of arXiv 2506.23423)

The residual stream moves by f_FT alone, so f_PT is needed at last tokens only: the base's norm,
keys and values at every token, its query, output and MLP at the last token of each prompt. At the
last layer the same holds for the tuned model.

Legend: B rows, T tokens, C last tokens of a row (1, or as many as prompts are packed into it), D
residual width, L layers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from common_jax import struct
from common_jax.mesh import constrain
from tuco_jax.core.cache import Ahead, LayerCache
from tuco_jax.core.engine import Phase, run
from tuco_jax.core.layer import PairLayer
from tuco_jax.core.places import Places, pick
from tuco_jax.core.residual import begin, share
from tuco_jax.core.tokens import as_tokens
from tuco_jax.core.walk import Source, as_source
from tuco_jax.models.layers import Delta
from tuco_jax.models.pair import Pair

__all__ = [
    "Carry",
    "LastToken",
    "LastTokenStep",
    "LastTokens",
    "last_token",
    "last_tokens",
    "tuco",
]


@struct.dataclass
class LastToken:
    """Result of `last_token` (shapes of rows [B]) or of `last_tokens` ([B, C]), float32.

    layers: beta_1 .. beta_L of the last token, from sums up to each layer; the last one is tuco.
    ptc, ftc: sums over layers. ftc_attention, ftc_mlp: parts of ftc (a variant that is not in the
    paper). telescoping: max |x_L - x_0 - PTC - FTC| / max |x_L|, over D.
    """

    tuco: Float[Array, "..."]
    layers: Float[Array, "L ..."]
    ptc: Float[Array, "... D"]
    ftc: Float[Array, "... D"]
    ftc_attention: Float[Array, "... D"]
    ftc_mlp: Float[Array, "... D"]
    telescoping: Float[Array, "..."]


class Carry(NamedTuple):
    """The carry from layer to layer, float32.

    x: the residual stream. first, last: the last tokens' x_0, and their x so far. sums: of PTC,
    FTC and FTC's two parts.
    """

    x: Float[Array, "B T D"]
    first: Float[Array, "B C D"]
    last: Float[Array, "B C D"]
    sums: tuple[Float[Array, "B C D"], ...]


@struct.dataclass
class LastTokenStep:
    """The step of one layer; returns beta_l, of the sums up to it.

    full: move the stream at every token; False at the last layer, after which only last tokens
    matter. ahead: of the prefixes that rows follow.
    """

    places: Places
    full: bool = struct.field(pytree_node=False)
    norm: int = struct.field(pytree_node=False)
    mesh: Mesh | None = struct.field(pytree_node=False)
    ahead: Ahead | None = None

    def lead(
        self, x: Float[Array, "G P D"], layer: PairLayer, _: None, at: Places
    ) -> tuple[Float[Array, "G P D"], LayerCache]:
        """Prefixes through the layer: FT alone moves them, and nothing of them is asked."""
        seen = layer.tuned.keys_values(x, at.tuned), layer.base.keys_values(x, at.base)
        if self.full:
            x = constrain(x + layer.tuned.whole(x, at.tuned).total, self.mesh)
        return x, seen

    def __call__(
        self, carry: Carry, layer: PairLayer, _: None
    ) -> tuple[Carry, Float[Array, "B C"]]:
        """The base at the last tokens, the tuned model at every token if `full`."""
        x, first, last, sums = carry
        places = self.places
        assert places.columns is not None
        tuned, base = (self.ahead and self.ahead.join(model) for model in (0, 1))
        pt = layer.base.selected(last, x, places.base, base)[0]
        if self.full:
            everywhere = layer.tuned.added(x, places.tuned, join=tuned)
            ft = Delta(*(pick(part, places.columns) for part in everywhere))
            x = x + everywhere.total
        else:
            ft = layer.tuned.selected(last, x, places.tuned, tuned)[0]
        own = (pt.total, ft.total - pt.total, ft.attention - pt.attention, ft.mlp - pt.mlp)
        # The step of the stream at the last tokens, so that `last` equals x there.
        x, last, own = constrain((x, last + ft.total, own), self.mesh)
        sums = tuple(s + o for s, o in zip(sums, own, strict=True))
        return Carry(x, first, last, sums), share(sums[0], sums[1], self.norm)


@struct.dataclass
class LastTokens:
    """The engine of `last_tokens`; fields as its arguments."""

    tokens: Int[Array, "B T"] | None
    mask: Shaped[Array, "B T"]
    columns: Int[Array, "B C"] | None = None
    segments: Int[Array, "B T"] | None = None
    embeddings: Float[Array, "B T D"] | None = None
    norm: int = struct.field(pytree_node=False, default=1)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)
    axis = 0  # of rows in the carry

    def state(self, ends: Pair) -> Places:
        """The tokens' places."""
        return Places.of(ends, self.mask, self.columns, self.segments)

    def enter(
        self, ends: Pair, tokens: Int[Array, "B T"] | None, places: Places
    ) -> Float[Array, "B T D"]:
        """x_0 of some tokens."""
        return begin(ends, tokens, self.embeddings, places, self.mesh)

    def begin(self, ends: Pair, state: Places) -> Carry:
        """x_0 everywhere, and at the last tokens; sums at zero."""
        x = self.enter(ends, self.tokens, state)
        assert state.columns is not None
        first = pick(x, state.columns)
        return Carry(x, first, first, (jnp.zeros_like(first),) * 4)

    def phases(self, state: Places, depth: int) -> list[Phase]:
        """The full step up to the last layer, which has its own."""
        middle, last = (
            LastTokenStep(state, full=full, norm=self.norm, mesh=self.mesh)
            for full in (True, False)
        )
        before = [Phase(middle, 0, depth - 1)] if depth > 1 else []
        return [*before, Phase(last, depth - 1, depth)]

    def finish(self, ends: Pair, carry: Carry, outs: Sequence[Float[Array, "_ B C"]]) -> LastToken:
        """The result; outs: beta_l."""
        by_layer: Any = jnp.concatenate(outs)
        ptc, ftc, attention, mlp = carry.sums
        error = jnp.max(jnp.abs(carry.last - carry.first - ptc - ftc), axis=-1)
        largest = jnp.max(jnp.abs(carry.last), axis=-1)
        error = error / jnp.where(largest == 0, 1, largest)
        return LastToken(by_layer[-1], by_layer, ptc, ftc, attention, mlp, error)


def last_tokens(
    pair: Pair | Source,
    tokens: Int[Array, "B T"] | None,
    mask: Shaped[Array, "B T"],
    *,
    columns: Int[Array, "B C"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    embeddings: Float[Array, "B T D"] | None = None,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> LastToken:
    """`last_token` of rows that hold several prompts: results have axes [B, C].

    segments: contiguous; the prompt of its row that a token belongs to, and attends to. columns:
    of each prompt's last token; a row with fewer than C repeats any of its own.
    """
    source = as_source(pair)
    if tokens is not None:
        tokens, mask = as_tokens(tokens, mask, source.ends.tuned_config.vocab_size)
    engine = LastTokens(tokens, mask, columns, segments, embeddings, norm=norm, mesh=mesh)
    return run(engine, source)


def last_token(
    pair: Pair | Source,
    tokens: Int[Array, "B T"] | None,
    mask: Shaped[Array, "B T"],
    *,
    embeddings: Float[Array, "B T D"] | None = None,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> LastToken:
    """PTC, FTC and TuCo at each row's last real token.

    Args:
        pair: the two models, or a source of their layers (`core/walk.py`).
        tokens: token ids; None with `embeddings`.
        mask: True at real tokens; padding on either side.
        embeddings: x_0 in place of tokens.
        norm: 1, the paper's, or 2.
        mesh: as in `decompose`.

    Outside compiled functions InputError is raised for tokens outside the vocabulary.

    Pure, jittable and differentiable. For gradients by weights `decompose` is cheaper: here layers
    are indexed rather than scanned over, to leave the last one out of the full pass.
    """
    out = last_tokens(pair, tokens, mask, embeddings=embeddings, norm=norm, mesh=mesh)
    by_layer = out.layers[:, :, 0]
    rest = {f: getattr(out, f)[:, 0] for f in LastToken.__dataclass_fields__ if f != "layers"}  # pyright: ignore[reportAttributeAccessIssue]
    return LastToken(layers=by_layer, **rest)


def tuco(
    pair: Pair | Source,
    tokens: Int[Array, "B T"] | None,
    mask: Shaped[Array, "B T"],
    *,
    embeddings: Float[Array, "B T D"] | None = None,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> Float[Array, " B"]:
    """TuCo of each row, in [0, 1] (Definition 4.3); arguments as of `last_token`."""
    return last_token(pair, tokens, mask, embeddings=embeddings, norm=norm, mesh=mesh).tuco
