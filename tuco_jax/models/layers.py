"""The one transformer block of every family, as Linen leaves used through `apply` only.

Legend: B batch, T tokens (keys), Q query tokens, D residual width, H query heads, K key/value
heads, G = H / K, h head width, F MLP width, R rotary tables.

A block returns what it adds to the residual stream, never the sum: f(x, l) in the TuCo paper
(arXiv 2506.23423, section 4). It does so in two steps, `keys_values` and `delta`, because the
exact last-token score needs keys and values at every token and the rest at one token only, and
decoding needs them from a cache. Weights may be of any float type: matrix products take operands
of that type and accumulate in float32; everything else is float32.
"""

import functools
import itertools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from tuco_jax.models.config import ModelConfig, Rope

__all__ = [
    "Block",
    "Delta",
    "KeysValues",
    "LayerInfo",
    "Linear",
    "Positions",
    "block_delta",
    "block_keys_values",
    "layer_infos",
    "make_norm",
    "softcap",
    "whole_block",
]

_MASKED = -1e30  # finite, so that a query which sees no key yields finite numbers
_PRECISION = jax.lax.Precision.HIGHEST  # float32 means float32 on TPU and GPU too


KeysValues = tuple[jax.Array, jax.Array]  # rotated keys and values, [B, K, T, h] each
Variables = dict[str, Any]  # {"params": ...}, and "lora" where there are low-rank factors


class Delta(NamedTuple):
    """What one block adds to the stream, [B, Q, D] each; their sum is f(x, l)."""

    attention: jax.Array
    mlp: jax.Array

    @property
    def total(self) -> jax.Array:
        return self.attention + self.mlp


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
        """Tables for given positions `index` [B, T] in rows of `lengths` [B] (or [B, T]) tokens."""
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
    """Cos and sin [B, T, r / 2] of one rotary embedding, its variant chosen by length [B (, T)]."""
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


def _rotate(x: jax.Array, positions: Positions, info: LayerInfo) -> jax.Array:
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


def _visible(query: Positions, key: Positions, window: jax.Array) -> jax.Array:
    """Which keys a query attends to, [B, Q, T] bool."""
    distance = query.index[:, :, None] - key.index[:, None, :]
    visible = (distance >= 0) & key.mask[:, None, :]
    visible &= (window == 0) | (distance < window)
    if query.segments is not None and key.segments is not None:
        visible &= query.segments[:, :, None] == key.segments[:, None, :]
    return visible


def _query_parts(
    query: Positions, key: Positions, queries: int, keys: int
) -> list[tuple[int, int, int]]:
    """(start, stop, keys that any of these queries can see): queries that are computed together.

    Where a row attends to itself no token sees a later column, so that its first half needs no
    more than the first half of the keys. Short rows gain nothing by it, and programs grow.
    """
    count = 1 if queries < 96 else min(8, queries // 24)
    if query is not key or query.segments is not None or count == 1:
        return [(0, queries, keys)]
    bounds = [queries * i // count for i in range(count + 1)]
    return [(start, stop, stop) for start, stop in itertools.pairwise(bounds)]


class Linear(nn.Module):
    """x W + b [.., out], plus (x A) B where the "lora" collection holds factors.

    The adapter's scale is folded into B. W x is written once, so that a base and its adapter
    share it when both are evaluated on the same x.
    """

    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = _matmul(x, kernel)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y += _matmul(_matmul(x, a), b)
        if self.bias:
            y += self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return y


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(
        x.astype(kernel.dtype), kernel, precision=_PRECISION, preferred_element_type=jnp.float32
    )


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale), over the last axis, in float32."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * inverse * (scale.astype(jnp.float32) + self.offset)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias, over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * scale.astype(jnp.float32) + bias.astype(jnp.float32)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that a model uses on its residual stream."""
    if config.norm == "layer":
        return LayerNorm(config.norm_eps)
    return RMSNorm(config.norm_eps, config.norm_offset)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Squash x into (-cap, cap): cap tanh(x / cap). A cap of 0 leaves x as it is."""
    return cap * jnp.tanh(x / cap) if cap else x


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, a window and optional query/key norms."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.q = Linear(c.heads * c.head_dim, c.qkv_bias)
        self.k = Linear(c.kv_heads * c.head_dim, c.qkv_bias)
        self.v = Linear(c.kv_heads * c.head_dim, c.qkv_bias)
        self.o = Linear(c.width, c.out_bias)
        if c.qk_norm != "none":
            self.q_norm = RMSNorm(c.norm_eps, c.norm_offset)
            self.k_norm = RMSNorm(c.norm_eps, c.norm_offset)

    def _heads(self, x: jax.Array, norm: nn.Module | None) -> jax.Array:
        """[B, T, heads * h] -> [B, T, heads, h], normed over the width or over each head."""
        split = (*x.shape[:-1], -1, self.config.head_dim)
        if norm is None:
            return x.reshape(split)
        if self.config.qk_norm == "width":
            return norm(x).reshape(split)
        return norm(x.reshape(split))

    def keys_values(self, x: jax.Array, positions: Positions, info: LayerInfo) -> KeysValues:
        norm = self.k_norm if self.config.qk_norm != "none" else None
        keys = _rotate(self._heads(self.k(x), norm), positions, info)
        values = self._heads(self.v(x), None)
        dtype = self.k.get_variable("params", "kernel").dtype
        return keys.swapaxes(1, 2).astype(dtype), values.swapaxes(1, 2).astype(dtype)

    def attend(
        self,
        x: jax.Array,
        keys_values: KeysValues,
        query: Positions,
        key: Positions,
        info: LayerInfo,
    ) -> jax.Array:
        c = self.config
        keys, values = keys_values
        norm = self.q_norm if c.qk_norm != "none" else None
        q = _rotate(self._heads(self.q(x), norm), query, info) * c.query_scale
        # Heads first and the heads of a group in one matrix: XLA on CPU runs these products three
        # times as fast as one einsum over all five axes.
        rows, queries, group = *q.shape[:2], c.heads // c.kv_heads
        q = q.reshape(rows, queries, c.kv_heads, group, c.head_dim).transpose(0, 2, 3, 1, 4)
        # Added rather than selected: the same number, and XLA on CPU fuses attention into one.
        hidden = jnp.where(_visible(query, key, info.window), 0.0, _MASKED)[:, None, None]
        parts = []
        for start, stop, seen in _query_parts(query, key, queries, keys.shape[2]):
            part = q[:, :, :, start:stop].reshape(rows, c.kv_heads, -1, c.head_dim)
            logits = _matmul(part, keys[:, :, :seen].swapaxes(2, 3))
            logits = logits.reshape(rows, c.kv_heads, group, stop - start, seen)
            logits = softcap(logits, c.attention_softcap) + hidden[..., start:stop, :seen]
            # Softmax, divided by its sum after the product: there are fewer numbers there.
            most = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
            weights = jnp.exp(logits - most)
            mixed = _matmul(weights.reshape(rows, c.kv_heads, -1, seen), values[:, :, :seen])
            mixed = mixed.reshape(rows, c.kv_heads, group, stop - start, c.head_dim)
            parts.append(mixed / jnp.sum(weights, axis=-1, keepdims=True))
        mixed = jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4)
        return self.o(mixed.reshape(rows, queries, c.heads * c.head_dim))


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class MLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) where the family has no gate."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        act = _ACTIVATIONS[c.activation]
        y = Linear(c.mlp_width, c.mlp_bias, name="up")(x)
        if c.gated:
            y = act(Linear(c.mlp_width, c.mlp_bias, name="gate")(x)) * y
        else:
            y = act(y)
        return Linear(c.width, c.mlp_bias, name="down")(y)


class Block(nn.Module):
    """One decoder layer: f(x, l) of the paper, in two steps or at once.

    `keys_values` [B, K, T, h] twice needs the stream at every token; `delta` gives what the layer
    adds at the query tokens, which may be all of them, the last one, or a newly decoded one.
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.attention = Attention(c)
        self.mlp = MLP(c)
        if c.pre_norm:
            self.attention_norm = make_norm(c)
            self.mlp_norm = make_norm(c)
        if c.post_norm:
            self.attention_post_norm = make_norm(c)
            self.mlp_post_norm = make_norm(c)

    def keys_values(self, x: jax.Array, positions: Positions, info: LayerInfo) -> KeysValues:
        """Rotated keys and values of x [B, T, D]: two arrays [B, K, T, h]."""
        if self.config.pre_norm:
            x = self.attention_norm(x)
        return self.attention.keys_values(x, positions, info)

    def delta(
        self,
        x: jax.Array,
        keys_values: KeysValues,
        query: Positions,
        key: Positions,
        info: LayerInfo,
    ) -> Delta:
        """What the layer adds at the query tokens x [B, Q, D]."""
        c = self.config
        attention = self.attention.attend(
            self.attention_norm(x) if c.pre_norm else x, keys_values, query, key, info
        )
        if c.post_norm:
            attention = self.attention_post_norm(attention)
        y = x if c.parallel else x + attention
        mlp = self.mlp(self.mlp_norm(y) if c.pre_norm else y)
        if c.post_norm:
            mlp = self.mlp_post_norm(mlp)
        return Delta(attention, mlp)

    def __call__(self, x: jax.Array, positions: Positions, info: LayerInfo) -> Delta:
        """What the layer adds at every token of x [B, T, D]."""
        keys_values = self.keys_values(x, positions, info)
        return self.delta(x, keys_values, positions, positions, info)


@functools.partial(jax.jit, static_argnums=0)
def block_keys_values(
    config: ModelConfig, weights: Variables, x: jax.Array, positions: Positions, info: LayerInfo
) -> KeysValues:
    """`Block.keys_values` as a pure function of one layer's variables."""
    out = Block(config).apply(weights, x, positions, info, method="keys_values")
    return cast(KeysValues, out)


@functools.partial(jax.jit, static_argnums=0)
def block_delta(
    config: ModelConfig,
    weights: Variables,
    x: jax.Array,
    keys_values: KeysValues,
    query: Positions,
    key: Positions,
    info: LayerInfo,
) -> Delta:
    """`Block.delta` as a pure function of one layer's variables."""
    out = Block(config).apply(weights, x, keys_values, query, key, info, method="delta")
    return cast(Delta, out)


@functools.partial(jax.jit, static_argnums=0)
def whole_block(
    config: ModelConfig, weights: Variables, x: jax.Array, positions: Positions, info: LayerInfo
) -> Delta:
    """What one layer adds at every token of x [B, T, D], a pure function of its variables."""
    return cast(Delta, Block(config).apply(weights, x, positions, info))
