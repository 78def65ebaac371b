"""Where tokens stand in a row, and the rotary tables of one model for these places.

Legend: B batch, T tokens, R rotary tables, r rotated features of a head, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from tuco_jax.models.config import ModelConfig, Rope

__all__ = ["LayerInfo", "Positions", "layer_infos", "rotate"]


class LayerInfo(NamedTuple):
    """What differs between layers of one model: scalars, or [L] arrays when stacked."""

    rope: jax.Array
    window: jax.Array


def layer_infos(config: ModelConfig) -> LayerInfo:
    """Per-layer rotary table index and attention window, [L] int32 each (window 0: unlimited)."""
    return LayerInfo(jnp.asarray(config.rope_index, int), jnp.asarray(config.windows, int))


@struct.dataclass
class Positions:
    """Where tokens stand: position, reality, document, and the rotary tables of one model.

    index [B, T] int, mask [B, T] bool (True: a real token), segments [B, T] int or None (tokens
    attend within their own segment only), cos and sin [R, B, T, r / 2] or None.
    """

    index: jax.Array
    mask: jax.Array
    segments: jax.Array | None
    cos: jax.Array | None
    sin: jax.Array | None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        mask: jax.Array,
        segments: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> "Positions":
        """Positions cumsum(mask) - 1 [B, T], restarted at each segment, with their tables.

        lengths [B] or [B, T]: the row (or segment) length that length-dependent RoPE variants
        (LongRoPE, dynamic NTK) decide by; by default the number of real tokens. A segment's tokens
        are contiguous and real.
        """
        mask = mask.astype(bool)
        index = jnp.cumsum(mask, axis=1) - 1
        if segments is not None:
            changes = segments[:, 1:] != segments[:, :-1]
            edge = jnp.ones_like(mask[:, :1])
            starts = jnp.concatenate([edge, changes], axis=1)
            index = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
            if lengths is None:
                column = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
                ends = jnp.concatenate([changes, edge], axis=1)
                last = jnp.where(ends, column, mask.shape[1])
                lengths = index + jax.lax.cummin(last, axis=1, reverse=True) - column + 1
        elif lengths is None:
            lengths = index.max(axis=1) + 1
        return cls.at(config, index, mask, segments, lengths)

    @classmethod
    def at(
        cls,
        config: ModelConfig,
        index: jax.Array,
        mask: jax.Array,
        segments: jax.Array | None,
        lengths: jax.Array,
    ) -> "Positions":
        """Tables for given positions `index` [B, T] in rows of `lengths` [B] or [B, T]."""
        if not config.ropes:
            return cls(index, mask, segments, None, None)
        tables = [_rotary_table(rope, index, lengths) for rope in config.ropes]
        cos, sin = (jnp.stack(t) for t in zip(*tables, strict=True))
        return cls(index, mask, segments, cos, sin)

    def pick(self, columns: jax.Array) -> "Positions":
        """C tokens a row, [B, C], at `columns` [B, C]."""

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
        )


def _rotary_table(rope: Rope, index: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cos and sin [B, T, r / 2] of one rotary embedding, its variant chosen by length."""
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


def rotate(x: jax.Array, positions: Positions, info: LayerInfo) -> jax.Array:
    """Rotate the leading features of x [B, T, heads, h], halves paired (x_i, x_{i + r/2})."""
    if positions.cos is None or positions.sin is None:
        return x
    one_table = positions.cos.shape[0] == 1
    cos = positions.cos[0] if one_table else positions.cos[info.rope]
    sin = positions.sin[0] if one_table else positions.sin[info.rope]
    cos, sin = cos[:, :, None], sin[:, :, None]
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
