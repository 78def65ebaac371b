"""Where tokens stand in a row, and the rotary tables of one model for these places.

Legend: B batch, T tokens, C tokens picked from each row, R rotary tables, r rotated features of a
head, h head width, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from common_jax import struct
from tuco_jax.models.config import ModelConfig, Rope

__all__ = ["EVERY", "LayerInfo", "Positions", "layer_infos", "rotate", "spans"]

EVERY = -1  # the segment of a shared prefix's keys: queries see those before their own `start`


class LayerInfo(NamedTuple):
    """What differs between layers of one model: scalars, or [L] arrays when stacked.

    rope: which rotary table. window: how many tokens back a query sees; 0: all.
    """

    rope: Int[Array, "*L"]
    window: Int[Array, "*L"]


def layer_infos(config: ModelConfig) -> LayerInfo:
    """Every layer's, stacked: arrays [L] int32."""
    return LayerInfo(jnp.asarray(config.rope_index, int), jnp.asarray(config.windows, int))


@struct.dataclass
class Positions:
    """Where tokens stand, and the rotary tables of one model for these places.

    index: positions, from 0. mask: True at real tokens. segments: tokens attend within their own
    segment only; None: a row is one segment. cos, sin: None for a model of learned positions.
    start: of queries behind a shared prefix, the position at which each one's segment begins: it
    sees what comes before.
    """

    index: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    segments: Int[Array, "B T"] | None
    cos: Float[Array, "R B T r/2"] | None
    sin: Float[Array, "R B T r/2"] | None
    start: Int[Array, "B T"] | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        mask: Shaped[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | Int[Array, "B T"] | None = None,
    ) -> "Positions":
        """Positions cumsum(mask) - 1, restarted at each segment, with their tables.

        lengths: the row's (or segment's) length, by which length-dependent RoPE variants
        (LongRoPE, dynamic NTK) choose frequencies; by default its number of real tokens. A
        segment's tokens are contiguous and real.
        """
        mask = mask.astype(bool)
        index, own = spans(mask, segments)
        lengths = own if lengths is None else lengths
        return cls.at(config, index, mask, segments, lengths)

    @classmethod
    def at(
        cls,
        config: ModelConfig,
        index: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        segments: Int[Array, "B T"] | None,
        lengths: Int[Array, " B"] | Int[Array, "B T"],
    ) -> "Positions":
        """Tables for given positions `index` in rows (or segments) of `lengths`."""
        if not config.ropes:
            return cls(index, mask, segments, None, None)
        tables = [_rotary_table(rope, index, lengths) for rope in config.ropes]
        cos, sin = (jnp.stack(t) for t in zip(*tables, strict=True))
        return cls(index, mask, segments, cos, sin)

    def pick(self, columns: Int[Array, "B C"]) -> "Positions":
        """Those of C tokens a row, at `columns`."""

        def take(a: jax.Array) -> jax.Array:
            return jnp.take_along_axis(a, columns, axis=1)

        def take_table(a: jax.Array) -> jax.Array:
            return jnp.take_along_axis(a, columns[None, :, :, None], axis=2)

        return Positions(
            take(self.index),
            take(self.mask),
            None if self.segments is None else take(self.segments),
            None if self.cos is None else take_table(self.cos),
            None if self.sin is None else take_table(self.sin),
            None if self.start is None else take(self.start),
        )


def spans(
    mask: Bool[Array, "B T"], segments: Int[Array, "B T"] | None
) -> tuple[Int[Array, "B T"], Int[Array, " B"] | Int[Array, "B T"]]:
    """Positions cumsum(mask) - 1, restarted at each segment; lengths of rows, or of segments."""
    index = jnp.cumsum(mask, axis=1) - 1
    if segments is None:
        return index, index.max(axis=1) + 1
    changes = segments[:, 1:] != segments[:, :-1]
    edge = jnp.ones_like(mask[:, :1])
    starts = jnp.concatenate([edge, changes], axis=1)
    index = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    column = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    ends = jnp.concatenate([changes, edge], axis=1)
    last = jnp.where(ends, column, mask.shape[1])
    return index, index + jax.lax.cummin(last, axis=1, reverse=True) - column + 1


def _rotary_table(
    rope: Rope, index: Int[Array, "B T"], lengths: Int[Array, "..."]
) -> tuple[Float[Array, "B T r/2"], Float[Array, "B T r/2"]]:
    """Cos and sin of one rotary embedding, its frequencies chosen by length."""
    lengths = lengths.reshape(*lengths.shape, *(1,) * (3 - lengths.ndim))  # [B, 1 or T, 1]
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)[None, None]  # [.., .., r / 2]
    scale = jnp.full((1, 1, 1), rope.scale, jnp.float32)
    if rope.long_frequencies:
        is_long = lengths > rope.switch
        long = jnp.asarray(rope.long_frequencies, jnp.float32)[None, None]
        frequencies = jnp.where(is_long, long, frequencies)
        scale = jnp.where(is_long, rope.long_scale, rope.scale)
    elif rope.dynamic_factor:
        # NTK: base' = base (factor n / n0 - factor + 1)^(d / (d - 2)), n >= n0.
        stretch = jnp.maximum(lengths, rope.switch) / rope.switch
        stretch = rope.dynamic_factor * stretch - (rope.dynamic_factor - 1)
        exponent = jnp.arange(0, rope.dim, 2, dtype=jnp.float32) / (rope.dim - 2)
        frequencies = frequencies * stretch ** -exponent[None, None]
    angles = index[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "B T heads h"], positions: Positions, info: LayerInfo
) -> Float[Array, "B T heads h"]:
    """Rotate the first r features of each head, halves paired: (x_i, x_{i + r/2})."""
    if positions.cos is None or positions.sin is None:
        return x
    one_table = positions.cos.shape[0] == 1
    cos = positions.cos[0] if one_table else positions.cos[info.rope]
    sin = positions.sin[0] if one_table else positions.sin[info.rope]
    cos, sin = cos[:, :, None], sin[:, :, None]
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
