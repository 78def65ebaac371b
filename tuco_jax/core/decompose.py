"""The decomposition of a tuned model into what the base does and what tuning adds, and TuCo.

"TuCo: Measuring the Contribution of Fine-Tuning to Individual Responses of LLMs", arXiv
2506.23423. On the tuned model's residual stream x_l, with f what a block adds to it:

    PTC(x, l) = f_PT(x, l)        FTC(x, l) = f_FT(x, l) - f_PT(x, l)
    x_L = x_0 + sum_l PTC(x_l, l) + sum_l FTC(x_l, l)      (exact)
    TuCo = |FTC_L[n]| / (|PTC_L[n]| + |FTC_L[n]|)          (Definition 4.3; n the last token)

Legend: B batch, T tokens, D residual width, L layers, V vocabulary.

Two forms of one function: `decompose` is the full one, `last_token` the exact form that scores
need. The stream moves by f_FT alone, so the base is wanted at the last token only: its norm, keys
and values at every token, its query, output and MLP at one. At the last layer the same holds for
the tuned model.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, merge, variables
from tuco_jax.models.layers import (
    Delta,
    LayerInfo,
    Positions,
    block_delta,
    block_keys_values,
    layer_infos,
    whole_block,
)
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import constrain

__all__ = [
    "Carry",
    "Decomposition",
    "LastToken",
    "Layers",
    "Places",
    "advance",
    "begin",
    "decompose",
    "finish",
    "last_column",
    "last_token",
    "share",
    "stacked_layers",
    "tuco",
]


@struct.dataclass
class Decomposition:
    """Result of `decompose`. Everything is float32.

    ptc, ftc: [B, T, D] sums over layers, or [L, B, T, D], each layer's own, with `layers=True`.
    ftc_attention, ftc_mlp: with `parts=True`, FTC's two parts in the same shape, else None; a
    variant, not of the paper: the MLP's part holds the answer of the MLP to the changed attention.
    hidden: [B, T, D], the stream before the final norm. logits: [B, T, V] or None. embeddings:
    x_0, [B, T, D].
    """

    ptc: jax.Array
    ftc: jax.Array
    ftc_attention: jax.Array | None
    ftc_mlp: jax.Array | None
    hidden: jax.Array
    logits: jax.Array | None
    embeddings: jax.Array


@struct.dataclass
class LastToken:
    """Result of `last_token`. Everything is float32.

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


def share(ptc: jax.Array, ftc: jax.Array, norm: int = 1, axis: Any = -1) -> jax.Array:
    """|ftc| / (|ptc| + |ftc|) over `axis`, 0/0 taken as 0 (its gradient, too)."""
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, not {norm!r}")

    def size(x: jax.Array) -> jax.Array:
        if norm == 1:
            return jnp.sum(jnp.abs(x), axis=axis)
        square = jnp.sum(jnp.square(x), axis=axis)
        return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))

    p, f = size(ptc), size(ftc)
    total = p + f
    # Not `total > 0`: a norm that is not a number must stay one.
    return jnp.where(total == 0, 0, f / jnp.where(total == 0, 1, total))


def last_column(mask: jax.Array) -> jax.Array:
    """Column of each row's last real token, [B] int; padding may stand on either side."""
    return mask.shape[1] - 1 - jnp.argmax(mask.astype(bool)[:, ::-1], axis=1)


def _start(
    pair: Pair,
    tokens: jax.Array | None,
    mask: jax.Array,
    embeddings: jax.Array | None,
    mesh: Mesh | None,
) -> tuple[jax.Array, Positions, Positions]:
    """x_0 from the tuned model's embedding, and each model's own positions."""
    base = Positions.of(pair.base_config, mask)
    tuned = Positions.of(pair.tuned_config, mask)
    if (tokens is None) == (embeddings is None):
        raise ValueError("give either tokens [B, T] or embeddings [B, T, D]")
    if tokens is not None:
        embeddings = decoder.embed(pair.tuned_config, pair.tuned_params, tokens, tuned)
    assert embeddings is not None
    return constrain(embeddings.astype(jnp.float32), mesh), base, tuned


Layers = tuple[Params, Params, Params, LayerInfo, LayerInfo]


def stacked_layers(pair: Pair) -> Layers:
    """What differs from layer to layer, stacked: (base, tuned where it differs, lora, infos)."""
    return (
        pair.base["layers"],
        pair.tuned.get("layers", {}),
        pair.lora.get("layers", {}),
        layer_infos(pair.base_config),
        layer_infos(pair.tuned_config),
    )


def decompose(
    pair: Pair,
    tokens: jax.Array | None = None,
    mask: jax.Array | None = None,
    alpha: jax.Array | float = 1.0,
    *,
    embeddings: jax.Array | None = None,
    layers: bool = False,
    logits: bool = False,
    parts: bool = False,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Decomposition:
    """Split every block of the tuned model into PTC and FTC along the (alpha-scaled) stream.

    x_{l+1} = x_l + PTC(x_l, l) + alpha FTC(x_l, l) (Definition 5.1), computed as
    x_l + f_FT + (alpha - 1) FTC, which is exact at alpha = 1.

    Args:
        pair: the two models.
        tokens: [B, T] int. Or `embeddings` [B, T, D], the stream x_0 itself.
        mask: [B, T], True at real tokens; padding on either side. None: all are real.
        alpha: broadcastable to [L, B]: a scalar, [L, 1] per layer, [B] per example.
        embeddings: x_0 in place of tokens (for gradients and soft prompts).
        layers: keep each layer's own components instead of their sums.
        parts: also split FTC into attention's and the MLP's.
        logits: also apply the tuned model's final norm and head.
        remat: recompute activations in the backward pass.
        mesh: where the pair is spread (`models/sharding.py`); the stream then stays cut by rows.

    Pure, jittable, and differentiable in alpha, embeddings and weights.
    """
    given = tokens if tokens is not None else embeddings
    if given is None:
        raise ValueError("give either tokens [B, T] or embeddings [B, T, D]")
    if mask is None:
        mask = jnp.ones(given.shape[:2], bool)
    x0, at_base, at_tuned = _start(pair, tokens, mask, embeddings, mesh)
    depth = pair.base_config.depth
    alphas = jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), (depth, mask.shape[0]))

    def body(carry, xs):
        x, sums = carry
        (base, changed, lora, base_info, tuned_info), alpha = xs
        pt = whole_block(pair.base_config, {"params": base}, x, at_base, base_info)
        tuned = variables(merge(base, changed), lora)
        ft = whole_block(pair.tuned_config, tuned, x, at_tuned, tuned_info)
        ftc = ft.total - pt.total
        own = (pt.total, ftc)
        if parts:
            own += (ft.attention - pt.attention, ft.mlp - pt.mlp)
        x = x + ft.total + (alpha[:, None, None] - 1) * ftc
        x, own = constrain((x, own), mesh)
        if layers:
            return (x, sums), own
        return (x, tuple(s + o for s, o in zip(sums, own, strict=True))), None

    if remat:
        body = jax.checkpoint(body)
    sums: Any = () if layers else (jnp.zeros_like(x0),) * (4 if parts else 2)
    (x, sums), own = jax.lax.scan(body, (x0, sums), (stacked_layers(pair), alphas))
    ptc, ftc, *split = own if own is not None else sums
    attention, mlp = split if parts else (None, None)
    out = None
    if logits:
        out = decoder.logits(pair.tuned_config, pair.tuned_params, x, pair.lora)
    return Decomposition(ptc, ftc, attention, mlp, x, out, x0)


class Carry(NamedTuple):
    """What the last-token form hands from layer to layer, float32.

    x [B, T, D], the stream; first and last [B, 1, D], the last token's x_0 and its x so far; sums,
    four [B, 1, D]: PTC, FTC and FTC's two parts.
    """

    x: jax.Array
    first: jax.Array
    last: jax.Array
    sums: tuple[jax.Array, ...]


class Places(NamedTuple):
    """Where tokens stand, for each model, and the column [B] of each row's last one."""

    base: Positions
    tuned: Positions
    column: jax.Array


def _pick(x: jax.Array, column: jax.Array) -> jax.Array:
    """One token a row, [B, 1, D]."""
    return jnp.take_along_axis(x, column[:, None, None], axis=1)


def begin(
    pair: Pair,
    tokens: jax.Array | None,
    mask: jax.Array,
    embeddings: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[Carry, Places]:
    """The last-token form before its first layer. Of the pair no layers are needed."""
    x, base, tuned = _start(pair, tokens, mask, embeddings, mesh)
    column = last_column(mask)
    first = _pick(x, column)
    return Carry(x, first, first, (jnp.zeros_like(first),) * 4), Places(base, tuned, column)


def advance(
    configs: tuple[ModelConfig, ModelConfig],
    carry: Carry,
    layer: Layers,
    places: Places,
    *,
    full: bool,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> tuple[Carry, jax.Array]:
    """One layer of the last-token form, and beta_l [B], of the sums up to it.

    configs: (base's, tuned's). layer: an index of each leaf of `stacked_layers`. full: move the
    stream at every token; false for the last layer, after which only the last token's counts.
    """
    x, first, last, sums = carry
    base, changed, lora, base_info, tuned_info = layer
    base, tuned = {"params": base}, variables(merge(base, changed), lora)

    def at_last(config: ModelConfig, weights: Params, at: Positions, info: LayerInfo) -> Delta:
        keys_values = block_keys_values(config, weights, x, at, info)
        return block_delta(
            config, weights, last, keys_values, at.pick(places.column[:, None]), at, info
        )

    pt = at_last(configs[0], base, places.base, base_info)
    if full:
        everywhere = whole_block(configs[1], tuned, x, places.tuned, tuned_info)
        ft = Delta(*(_pick(part, places.column) for part in everywhere))
        moved = x + everywhere.total
    else:
        ft, moved = at_last(configs[1], tuned, places.tuned, tuned_info), x
    own = (pt.total, ft.total - pt.total, ft.attention - pt.attention, ft.mlp - pt.mlp)
    # The stream's own move at the last token, so that `last` equals x there.
    x, last, own = constrain((moved, last + ft.total, own), mesh)
    sums = tuple(s + o for s, o in zip(sums, own, strict=True))
    return Carry(x, first, last, sums), share(sums[0], sums[1], norm)[:, 0]


def finish(carry: Carry, betas: jax.Array) -> LastToken:
    """The result, after all layers; betas [L, B]."""
    ptc, ftc, attention, mlp = (s[:, 0] for s in carry.sums)
    first, last = carry.first[:, 0], carry.last[:, 0]
    error = jnp.max(jnp.abs(last - first - ptc - ftc), axis=1)
    largest = jnp.max(jnp.abs(last), axis=1)
    error = error / jnp.where(largest == 0, 1, largest)
    return LastToken(betas[-1], betas, ptc, ftc, attention, mlp, error)


def last_token(
    pair: Pair,
    tokens: jax.Array | None,
    mask: jax.Array,
    *,
    embeddings: jax.Array | None = None,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> LastToken:
    """PTC, FTC and TuCo at each row's last real token, exactly, for about one forward pass.

    tokens [B, T] int (or embeddings [B, T, D]), mask [B, T]; norm 1 (the paper's) or 2;
    mesh as in `decompose`.
    Differentiable; with respect to weights `decompose` is the cheaper way, since the layers here
    are indexed rather than scanned over, to leave the last one out of the full pass.
    """
    carry, places = begin(pair, tokens, mask, embeddings, mesh)
    configs = pair.base_config, pair.tuned_config
    layers = stacked_layers(pair)

    def body(carry: Carry, index: jax.Array | int, full: bool = True):
        layer = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), layers
        )
        return advance(configs, carry, layer, places, full=full, norm=norm, mesh=mesh)

    depth = pair.base_config.depth
    carry, betas = jax.lax.scan(body, carry, jnp.arange(depth - 1))
    carry, beta = body(carry, depth - 1, full=False)
    return finish(carry, jnp.concatenate([betas, beta[None]]))


def tuco(
    pair: Pair,
    tokens: jax.Array | None,
    mask: jax.Array,
    *,
    embeddings: jax.Array | None = None,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> jax.Array:
    """TuCo of each row, [B] in [0, 1] (Definition 4.3). Pure, jittable, differentiable."""
    return last_token(pair, tokens, mask, embeddings=embeddings, norm=norm, mesh=mesh).tuco
