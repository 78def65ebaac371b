"""Layers of the trajectory networks (Diffuser, Janner et al. 2022), channels last.

Legend: B batch, T time steps, C channels of the input, F of the output, E width of the time
embedding.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from common_jax.errors import InputError
from reward_jax.models.conv import MANY, Method, chosen, conv1d, conv1d_transpose

__all__ = [
    "Activation",
    "Conv",
    "ConvBlock",
    "Downsample",
    "GroupNorm",
    "LinearAttention",
    "ResidualBlock",
    "TimeEmbedding",
    "Upsample",
    "activation",
    "check_trajectories",
    "mish",
]

Activation = Literal["mish", "silu", "relu", "leaky_relu"]


def mish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Mish, x tanh(log(1 + e^x)), by one exponential: n / (n + 2) with n = e^x (e^x + 2)."""
    # Beyond 10 the factor is 1 in float32; beyond 14, cubes of n overflow in second derivatives.
    e = jnp.exp(jnp.minimum(x, 10.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def activation(name: Activation) -> Callable[[Float[Array, "..."]], Float[Array, "..."]]:
    """The activation of that name; raises InputError for another."""
    if name not in get_args(Activation):
        raise InputError(
            f"activation {name!r} is unknown; known are {', '.join(get_args(Activation))}"
        )
    if name == "mish":
        return mish
    return {"silu": jax.nn.silu, "relu": jax.nn.relu, "leaky_relu": jax.nn.leaky_relu}[name]


def check_trajectories(x: Float[Array, "B H D"]) -> None:
    """Raise InputError for an x that has not three axes."""
    if x.ndim != 3:
        raise InputError(
            f"x_t has shape {list(x.shape)}, not [B, H, D]: this network is one of trajectories"
        )


class TimeEmbedding(nn.Module):
    """Embedding of the diffusion step: sines and cosines, then two dense layers."""

    width: int
    act: Activation = "mish"

    @nn.compact
    def __call__(self, t: Int[Array, " B"]) -> Float[Array, "B E"]:
        half = self.width // 2
        if half < 2:
            raise InputError(
                f"a time embedding has a width of 4 or more, not {self.width}: give the network "
                "another dim, or embedding"
            )
        rates = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(10000) / (half - 1)))
        angles = t[:, None].astype(rates.dtype) * rates[None]
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        x = activation(self.act)(nn.Dense(4 * self.width, name="first")(x))
        return nn.Dense(self.width, name="second")(x)


def _uniform(fan_in: int) -> Callable[..., jax.Array]:
    """PyTorch's default for weights and biases of convolutions: U(+-1 / sqrt(fan in))."""
    limit = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -limit, limit
    )


class Conv(nn.Module):
    """Convolution over time (`models/conv.py`), to U time steps."""

    features: int
    size: int
    stride: int = 1
    padding: int = 0
    use_bias: bool = True
    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B U F"]:
        shape = (self.size, x.shape[-1], self.features)
        fan_in = shape[0] * shape[1]
        kernel = self.param("kernel", _uniform(fan_in), shape)
        y = conv1d(x, kernel, stride=self.stride, padding=self.padding, method=self.method)
        if not self.use_bias:
            return y
        return y + self.param("bias", _uniform(fan_in), shape[-1:])[None, None]


class Downsample(nn.Module):
    """Half the time steps (U, rounded up), by a convolution of 3 taps."""

    use_bias: bool = True
    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B U C"]:
        conv = Conv(x.shape[-1], 3, 2, 1, self.use_bias, self.method, name="conv")
        return conv(x)


class Upsample(nn.Module):
    """Twice the time steps, by a transposed convolution of 4 taps."""

    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B 2*T C"]:
        channels = x.shape[-1]
        kernel = self.param("kernel", _uniform(4 * channels), (4, channels, channels))
        bias = self.param("bias", _uniform(4 * channels), (channels,))
        return conv1d_transpose(x, kernel, method=self.method) + bias[None, None]


class GroupNorm(nn.Module):
    """Group norm over time and the channels of a group, with the parameters of flax's own.

    Flax's repeats the statistics to every channel, which, differentiated twice, is a good part of
    what XLA has to compile. Here they stay [B, 1, groups, 1], or, where a CPU would sum a few
    channels at a time, are sums over time, then products with the groups' membership.
    """

    groups: int
    epsilon: float = 1e-5
    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        channels = x.shape[-1]
        if channels % self.groups:
            raise InputError(
                f"a layer of {channels} channels has no {self.groups} equal groups: give the "
                f"network a dim that {self.groups} divides"
            )
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        width = channels // self.groups
        if chosen(self.method) == "matmul" and width < 16 and x.shape[0] >= MANY:
            member = jnp.repeat(jnp.eye(self.groups, dtype=x.dtype), width, 0)  # [C, groups]
            y = x - (x.mean(1) @ member / width @ member.T)[:, None]
            variance = jnp.square(y).mean(1) @ member / width
            y = y * (jax.lax.rsqrt(variance + self.epsilon) @ member.T)[:, None]
        else:
            y = x.reshape(*x.shape[:2], self.groups, -1)
            y = y - y.mean((1, 3), keepdims=True)
            y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + self.epsilon)
        return y.reshape(x.shape) * scale[None, None] + bias[None, None]


class ConvBlock(nn.Module):
    """Convolution, group norm, activation."""

    features: int
    size: int = 5
    act: Activation = "mish"
    groups: int | None = 8  # None: no norm
    use_bias: bool = True
    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T F"]:
        x = Conv(
            self.features, self.size, 1, self.size // 2, self.use_bias, self.method, name="conv"
        )(x)
        if self.groups is not None:
            x = GroupNorm(self.groups, method=self.method, name="norm")(x)
        return activation(self.act)(x)


class ResidualBlock(nn.Module):
    """Two `ConvBlock`s, the time embedding added between them, and a shortcut."""

    features: int
    size: int = 5
    act: Activation = "mish"
    groups: int | None = 8
    use_bias: bool = True
    method: Method = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T C"], time: Float[Array, "B E"]
    ) -> Float[Array, "B T F"]:
        block: dict[str, Any] = dict(
            size=self.size,
            act=self.act,
            groups=self.groups,
            use_bias=self.use_bias,
            method=self.method,
        )
        added = nn.Dense(self.features, name="time")(activation(self.act)(time))
        y = ConvBlock(self.features, name="first", **block)(x) + added[:, None]
        y = ConvBlock(self.features, name="second", **block)(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, name="shortcut")(x)
        return y + x


class LinearAttention(nn.Module):
    """Residual attention, x + attention(norm(x)), linear in T.

    Keys are normalised over time, queries are not.
    """

    heads: int = 4
    width: int = 32

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        y = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x)
        y = nn.Dense(3 * self.heads * self.width, use_bias=False, name="qkv")(y)
        q, k, v = jnp.moveaxis(y.reshape(*y.shape[:2], 3, self.heads, self.width), 2, 0)
        out = _attended(jax.nn.softmax(k, axis=1), v, q * self.width**-0.5)
        return x + nn.Dense(x.shape[-1], name="out")(out.reshape(*x.shape[:2], -1))


def _attended(
    k: Float[Array, "B T N W"], v: Float[Array, "B T N W"], q: Float[Array, "B T N W"]
) -> Float[Array, "B T N W"]:
    """Of N heads, W wide: sum over s of (q_t . k_s) v_s, linear in T by summing k_s v_s first.

    Of a few steps, pairs of them are fewer operations than the W x W sums, and as sums in loops
    quicker than as products of such small matrices (on Zen 4, 512 rows: a fourth of the time at 4
    steps, a tenth at 2; with derivatives half to nine tenths; from 8 steps on, slower).
    """
    if k.shape[1] <= 4:
        pairs = jnp.sum(q[:, :, None] * k[:, None], axis=-1, keepdims=True)
        return jnp.sum(pairs * v[:, None], axis=2)
    context = jnp.einsum("bthd,bthe->bhde", k, v)
    return jnp.einsum("bhde,bthd->bthe", context, q)
