"""TuCo of last tokens, exactly, for about one forward pass.

    TuCo = |FTC_L[n]| / (|PTC_L[n]| + |FTC_L[n]|)     (Definition 4.3 of arXiv 2506.23423)

The stream moves by f_FT alone, so the base is wanted at last tokens only: its norm, keys and
values at every token, its query, output and MLP at one a prompt. At the last layer the same holds
for the tuned model.

Legend: B rows, T tokens, C last tokens of a row (1, or as many as prompts are packed into it), D
residual width, L layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from tuco_jax.core.layer import PairLayer
from tuco_jax.core.places import Places, pick
from tuco_jax.core.stream import begin, share
from tuco_jax.core.walk import Source, as_source, walk
from tuco_jax.models.layers import Delta
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import constrain

__all__ = [
    "Carry",
    "LastToken",
    "LastTokenStep",
    "begin_last",
    "finish_last",
    "last_token",
    "last_tokens",
    "tuco",
]


@struct.dataclass
class LastToken:
    """Result of `last_token`, float32; of `last_tokens` with [B, C] for [B].

    tuco [B]; layers [L, B], beta_1 .. beta_L of the last token (cumulative sums up to layer l,
    the last of them is tuco); ptc, ftc [B, D], the sums; ftc_attention, ftc_mlp [B, D], parts of
    ftc (a variant, not of the paper); telescoping [B], max |x_L - x_0 - PTC - FTC| / max |x_L|.
    """

    tuco: jax.Array
    layers: jax.Array
    ptc: jax.Array
    ftc: jax.Array
    ftc_attention: jax.Array
    ftc_mlp: jax.Array
    telescoping: jax.Array


class Carry(NamedTuple):
    """What goes from layer to layer, float32.

    x [B, T, D], the stream; first and last [B, C, D], the last tokens' x_0 and their x so far;
    sums, four [B, C, D]: PTC, FTC and FTC's two parts.
    """

    x: jax.Array
    first: jax.Array
    last: jax.Array
    sums: tuple[jax.Array, ...]


@struct.dataclass
class LastTokenStep:
    """One layer; returns beta_l [B, C] of the sums up to it.

    full: move the stream at every token; false for the last layer, after which only last tokens
    count.
    """

    places: Places
    full: bool = struct.field(pytree_node=False)
    norm: int = struct.field(pytree_node=False)
    mesh: Mesh | None = struct.field(pytree_node=False)

    def __call__(self, carry: Carry, layer: PairLayer, _: None) -> tuple[Carry, jax.Array]:
        """Base at the last tokens, tuned at every token where the stream goes on."""
        x, first, last, sums = carry
        places = self.places
        assert places.columns is not None
        pt = layer.base.wanted(last, x, places.base)[0]
        if self.full:
            everywhere = layer.tuned.whole(x, places.tuned)
            ft = Delta(*(pick(part, places.columns) for part in everywhere))
            x = x + everywhere.total
        else:
            ft = layer.tuned.wanted(last, x, places.tuned)[0]
        own = (pt.total, ft.total - pt.total, ft.attention - pt.attention, ft.mlp - pt.mlp)
        # The stream's own move at the last tokens, so that `last` equals x there.
        x, last, own = constrain((x, last + ft.total, own), self.mesh)
        sums = tuple(s + o for s, o in zip(sums, own, strict=True))
        return Carry(x, first, last, sums), share(sums[0], sums[1], self.norm)


def last_tokens(
    pair: Pair | Source,
    tokens: jax.Array | None,
    mask: jax.Array,
    *,
    columns: jax.Array | None = None,
    segments: jax.Array | None = None,
    embeddings: jax.Array | None = None,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> LastToken:
    """`last_token` of rows that hold several prompts, [B, C] each.

    segments: [B, T] int, contiguous: which prompt of its row a token belongs to; it attends to no
    other. columns: [B, C] int, the last token of each; a row of fewer repeats any of its own.
    """
    source = as_source(pair)
    carry, places = begin_last(source.ends, tokens, mask, columns, segments, embeddings, mesh=mesh)
    depth = source.ends.base_config.depth
    middle = LastTokenStep(places, full=True, norm=norm, mesh=mesh)
    betas = []
    if depth > 1:
        carry, own = walk(middle, carry, source, stop=depth - 1)
        betas.append(own)
    last = LastTokenStep(places, full=False, norm=norm, mesh=mesh)
    carry, own = walk(last, carry, source, start=depth - 1)
    return finish_last(carry, [*betas, own])


def last_token(
    pair: Pair | Source,
    tokens: jax.Array | None,
    mask: jax.Array,
    *,
    embeddings: jax.Array | None = None,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> LastToken:
    """PTC, FTC and TuCo at each row's last real token.

    Args:
        pair: the two models, or a source of their layers (`core/walk.py`).
        tokens: [B, T] int; None with `embeddings` [B, T, D], the stream x_0 itself.
        mask: [B, T], True at real tokens; padding on either side.
        embeddings: x_0 in place of tokens.
        norm: 1, the paper's, or 2.
        mesh: as in `decompose`.

    Differentiable; with respect to weights `decompose` is the cheaper way, since the layers here
    are indexed rather than scanned over, to leave the last one out of the full pass.
    """
    out = last_tokens(pair, tokens, mask, embeddings=embeddings, norm=norm, mesh=mesh)
    by_layer = out.layers[:, :, 0]
    rest = {f: getattr(out, f)[:, 0] for f in LastToken.__dataclass_fields__ if f != "layers"}  # pyright: ignore[reportAttributeAccessIssue]
    return LastToken(layers=by_layer, **rest)


def tuco(
    pair: Pair | Source,
    tokens: jax.Array | None,
    mask: jax.Array,
    *,
    embeddings: jax.Array | None = None,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> jax.Array:
    """TuCo of each row, [B] in [0, 1] (Definition 4.3). Pure, jittable, differentiable."""
    return last_token(pair, tokens, mask, embeddings=embeddings, norm=norm, mesh=mesh).tuco


@functools.partial(jax.jit, static_argnames="mesh")
def begin_last(
    ends: Pair,
    tokens: jax.Array | None,
    mask: jax.Array,
    columns: jax.Array | None,
    segments: jax.Array | None,
    embeddings: jax.Array | None,
    *,
    mesh: Mesh | None = None,
) -> tuple[Carry, Places]:
    """Before the first layer, of `last_tokens`' arguments."""
    places = Places.of(ends, mask, columns, segments)
    x = begin(ends, tokens, embeddings, places, mesh)
    assert places.columns is not None
    first = pick(x, places.columns)
    return Carry(x, first, first, (jnp.zeros_like(first),) * 4), places


@jax.jit
def finish_last(carry: Carry, betas: list[jax.Array]) -> LastToken:
    """After the last layer; betas: what the steps returned, [l, B, C] of some layers each."""
    by_layer: Any = jnp.concatenate(betas)
    ptc, ftc, attention, mlp = carry.sums
    error = jnp.max(jnp.abs(carry.last - carry.first - ptc - ftc), axis=-1)
    largest = jnp.max(jnp.abs(carry.last), axis=-1)
    error = error / jnp.where(largest == 0, 1, largest)
    return LastToken(by_layer[-1], by_layer, ptc, ftc, attention, mlp, error)
