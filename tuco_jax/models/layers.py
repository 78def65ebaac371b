"""The one transformer block of every family, as Linen leaves used through `apply` only.

Legend: B batch, T tokens (keys), Q query tokens, D residual width, H query heads, K key/value
heads, h head width, F MLP width.

A block returns what it adds to the residual stream, never the sum: f(x, l) in the TuCo paper
(arXiv 2506.23423, section 4). It does so in two steps, `keys_values` and `delta`, because the
exact last-token score needs keys and values at every token and the rest at one token only, and
decoding needs them from a cache. Weights may be of any type: the config's `precision` says how
products take activations (`numerics.product`); sums, and everything else, are float32.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common_jax.mesh import traced_mesh
from tuco_jax.models.attention import attend
from tuco_jax.models.config import ModelConfig, Precision
from tuco_jax.models.experts import Choice, PerExpert, mixed
from tuco_jax.models.numerics import along_last, product
from tuco_jax.models.positions import LayerInfo, Positions, rotate
from tuco_jax.models.sharding import gathered

__all__ = [
    "Block",
    "Delta",
    "KeysValues",
    "Linear",
    "Mixture",
    "block_delta",
    "block_keys_values",
    "make_norm",
    "whole_block",
]

KeysValues = tuple[Float[Array, "B K T h"], Float[Array, "B K T h"]]  # keys are rotated
Variables = dict[str, Any]  # {"params": ...}, and "lora" where there are low-rank factors


class Delta(NamedTuple):
    """What one block adds to the residual stream; their sum is f(x, l)."""

    attention: Float[Array, "B Q D"]
    mlp: Float[Array, "B Q D"]

    @property
    def total(self) -> Float[Array, "B Q D"]:
        return self.attention + self.mlp


class Linear(nn.Module):
    """x W + b, plus (x A) B where the "lora" collection holds factors.

    The adapter's scale is folded into B. W x is written once, so that a base and its adapter
    share it when both are evaluated at the same x. Where W is int8, its scales stand beside it.
    """

    features: int
    bias: bool = False
    precision: Precision = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = product(x, _whole(self, x, kernel), self.precision, _scale_of(self, kernel))
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y += product(product(x, a, self.precision), b, self.precision)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y += along_last(bias, y)
        return y


def _whole(module: nn.Module, x: Array, kernel: Array) -> Array:
    """An int8 kernel, whole along fsdp while it is one: gathered once it is cast, it is larger."""
    if kernel.dtype != jnp.int8:
        return kernel
    return gathered(f"{module.name}/kernel", kernel, traced_mesh(x))


def _scale_of(module: nn.Module, kernel: Array) -> Array | None:
    """The scales of an int8 kernel. Floats in its place, as of a tuned model, have none."""
    return module.get_variable("params", "scale") if kernel.dtype == jnp.int8 else None


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale), over the last axis, in float32."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... n"]:
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * inverse * (along_last(scale, x) + self.offset)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias, over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... n"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * along_last(scale, x) + along_last(bias, x)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that a model uses on its residual stream."""
    if config.norm == "layer":
        return LayerNorm(config.norm_eps)
    return RMSNorm(config.norm_eps, config.norm_offset)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, a window and, in some families, QK norms."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.q = Linear(c.heads * c.head_dim, c.qkv_bias, c.precision)
        self.k = Linear(c.kv_heads * c.head_dim, c.qkv_bias, c.precision)
        self.v = Linear(c.kv_heads * c.head_dim, c.qkv_bias, c.precision)
        self.o = Linear(c.width, c.out_bias, c.precision)
        if c.qk_norm != "none":
            self.q_norm = RMSNorm(c.norm_eps, c.norm_offset)
            self.k_norm = RMSNorm(c.norm_eps, c.norm_offset)

    def _heads(
        self, x: Float[Array, "B T heads*h"], norm: nn.Module | None
    ) -> Float[Array, "B T heads h"]:
        """Heads apart, normalised over the width or over each head."""
        split = (*x.shape[:-1], -1, self.config.head_dim)
        if norm is None:
            return x.reshape(split)
        if self.config.qk_norm == "width":
            return norm(x).reshape(split)
        return norm(x.reshape(split))

    def keys_values(
        self, x: Float[Array, "B T D"], positions: Positions, info: LayerInfo
    ) -> KeysValues:
        norm = self.k_norm if self.config.qk_norm != "none" else None
        keys = rotate(self._heads(self.k(x), norm), positions, info)
        values = self._heads(self.v(x), None)
        dtype = self.config.keys_dtype
        return keys.swapaxes(1, 2).astype(dtype), values.swapaxes(1, 2).astype(dtype)

    def attend(
        self,
        x: Float[Array, "B Q D"],
        keys_values: KeysValues,
        query: Positions,
        key: Positions,
        info: LayerInfo,
    ) -> Float[Array, "B Q D"]:
        c = self.config
        keys, values = keys_values
        norm = self.q_norm if c.qk_norm != "none" else None
        q = rotate(self._heads(self.q(x), norm), query, info) * c.query_scale
        mixed = attend(q, keys, values, query, key, info.window, c.windows, c.attention_softcap)
        return self.o(mixed.reshape(*x.shape[:2], c.heads * c.head_dim))


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class MLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) where the family has no gate."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        c = self.config
        act = _ACTIVATIONS[c.activation]
        linear = functools.partial(Linear, bias=c.mlp_bias, precision=c.precision)
        y = linear(c.mlp_width, name="up")(x)
        if c.gated:
            y = act(linear(c.mlp_width, name="gate")(x)) * y
        else:
            y = act(y)
        return linear(c.width, name="down")(y)


class _PerExpert(nn.Module):
    """One linear layer of every expert, with low-rank factors where there are some."""

    shape: tuple[int, int, int]  # [E, in, out]

    @nn.compact
    def __call__(self) -> PerExpert:
        kernel = self.param("kernel", nn.initializers.lecun_normal(batch_axis=(0,)), self.shape)
        scale, lora = _scale_of(self, kernel), None
        if self.has_variable("lora", "a"):
            lora = self.get_variable("lora", "a"), self.get_variable("lora", "b")
        return PerExpert(kernel, lora, scale)


class Mixture(nn.Module):
    """A few gated MLPs at each token, chosen and weighted by a router.

    Each model of a pair has a router of its own. The pre-trained block routes the stream that the
    tuned model makes by the pre-trained router, since f_PT(x, l) is all of that block: FTC holds
    what comes of another choice of experts, too, beside what comes of other experts. Where two
    experts are all but tied for the last place, rounding decides, and what the block adds jumps.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        c = self.config
        shares = jax.nn.softmax(
            Linear(c.experts, precision=c.precision, name="router")(x), axis=-1
        )
        choice = Choice(c.experts_used, c.experts_normed)
        layers = {
            "gate": _PerExpert((c.experts, c.width, c.mlp_width), name="gate")(),
            "up": _PerExpert((c.experts, c.width, c.mlp_width), name="up")(),
            "down": _PerExpert((c.experts, c.mlp_width, c.width), name="down")(),
        }
        return mixed(_ACTIVATIONS[c.activation], choice, x, shares, layers, c.precision)


class Block(nn.Module):
    """One decoder layer: f(x, l) of the paper, in two steps or at once.

    `keys_values` needs the residual stream at every token; `delta` gives what the layer adds at
    the query tokens, which may be all of them, the last one, or a newly decoded one.
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.attention = Attention(c)
        self.mlp = Mixture(c) if c.experts else MLP(c)
        if c.pre_norm:
            self.attention_norm = make_norm(c)
            self.mlp_norm = make_norm(c)
        if c.post_norm:
            self.attention_post_norm = make_norm(c)
            self.mlp_post_norm = make_norm(c)

    def keys_values(
        self, x: Float[Array, "B T D"], positions: Positions, info: LayerInfo
    ) -> KeysValues:
        """Rotated keys, and values, at every token of x."""
        if self.config.pre_norm:
            x = self.attention_norm(x)
        return self.attention.keys_values(x, positions, info)

    def delta(
        self,
        x: Float[Array, "B Q D"],
        keys_values: KeysValues,
        query: Positions,
        key: Positions,
        info: LayerInfo,
    ) -> Delta:
        """What the layer adds at the query tokens, whose residual stream is x."""
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

    def __call__(self, x: Float[Array, "B T D"], positions: Positions, info: LayerInfo) -> Delta:
        """What the layer adds at every token of x."""
        keys_values = self.keys_values(x, positions, info)
        return self.delta(x, keys_values, positions, positions, info)


@functools.partial(jax.jit, static_argnums=0)
def block_keys_values(
    config: ModelConfig,
    weights: Variables,
    x: Float[Array, "B T D"],
    positions: Positions,
    info: LayerInfo,
) -> KeysValues:
    """`Block.keys_values` as a pure function of one layer's variables."""
    out = Block(config).apply(weights, x, positions, info, method="keys_values")
    return cast(KeysValues, out)


@functools.partial(jax.jit, static_argnums=0)
def block_delta(
    config: ModelConfig,
    weights: Variables,
    x: Float[Array, "B Q D"],
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
    config: ModelConfig,
    weights: Variables,
    x: Float[Array, "B T D"],
    positions: Positions,
    info: LayerInfo,
) -> Delta:
    """What one layer adds at every token of x, as a pure function of its variables."""
    return cast(Delta, Block(config).apply(weights, x, positions, info))
