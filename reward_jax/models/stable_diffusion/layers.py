"""Layers that the U-Net and the autoencoder share. Modules are named as in diffusers' files.

A dot in a name is the file's own: "to_out.0" is one module here. A convolution of 1 x 1 is a
matrix product (`nn.Dense`), whether the file holds it as one or as the other.

Legend: B batch, H and W height and width, C and F channels of input and output, E width of the
time embedding, T tokens, D width of the text, Q queries.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from reward_jax.models.conv import conv2d
from reward_jax.models.stable_diffusion.attention import attend

__all__ = [
    "Conv",
    "GroupNorm",
    "LayerNorm",
    "Resnet",
    "Transformer",
    "attention",
    "downsample",
    "upsample",
]


class Conv(nn.Module):
    """Convolution of 3 x 3; padding: before and after, of both axes."""

    features: int
    stride: int = 1
    padding: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B ..."]:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        y = conv2d(x, kernel, stride=self.stride, padding=(self.padding,) * 2)
        return y + bias[None, None, None]


class GroupNorm(nn.Module):
    """Group norm, computed in float32."""

    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        y = y - y.mean((1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + self.epsilon)
        y = y.reshape(x.shape) * scale.astype(jnp.float32)[None, None, None]
        return (y + bias.astype(jnp.float32)[None, None, None]).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm, computed in float32."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        y = y * scale.astype(jnp.float32)[None, None] + bias.astype(jnp.float32)[None, None]
        return y.astype(x.dtype)


class Resnet(nn.Module):
    """Residual block; of the U-Net it is told the time, of the autoencoder it is not."""

    features: int
    groups: int
    epsilon: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], time: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B H W F"]:
        y = GroupNorm(self.groups, self.epsilon, name="norm1")(x)
        y = Conv(self.features, name="conv1")(jax.nn.silu(y))
        if time is not None:
            added = nn.Dense(self.features, name="time_emb_proj")(jax.nn.silu(time))
            y = y + added[:, None, None]
        y = GroupNorm(self.groups, self.epsilon, name="norm2")(y)
        y = Conv(self.features, name="conv2")(jax.nn.silu(y))
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, name="conv_shortcut")(x)
        return x + y


def attention(
    x: Float[Array, "B Q C"],
    context: Float[Array, "B T D"],
    heads: int,
    name: str = "",
    bias: bool = False,
) -> Float[Array, "B Q C"]:
    """Of x to a context; call it in a module. bias: of queries, keys and values."""
    width = x.shape[-1]
    made = (
        nn.Dense(width, use_bias=bias, name=f"{name}to_{part}")(given)
        for part, given in (("q", x), ("k", context), ("v", context))
    )
    q, k, v = (y.reshape(*y.shape[:2], heads, -1) for y in made)
    return nn.Dense(width, name=f"{name}to_out.0")(attend(q, k, v).reshape(x.shape))


class _TransformerBlock(nn.Module):
    heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q C"], text: Float[Array, "B T D"]
    ) -> Float[Array, "B Q C"]:
        y = LayerNorm(name="norm1")(x)
        x = x + attention(y, y, self.heads, "attn1.")
        x = x + attention(LayerNorm(name="norm2")(x), text, self.heads, "attn2.")
        y = nn.Dense(8 * x.shape[-1], name="ff.net.0.proj")(LayerNorm(name="norm3")(x))
        y, gate = jnp.split(y, 2, axis=-1)
        y = y * jax.nn.gelu(gate, approximate=False)
        return x + nn.Dense(x.shape[-1], name="ff.net.2")(y)


class Transformer(nn.Module):
    """Transformer blocks over the places of an image, which also attend to a text."""

    heads: int
    depth: int
    groups: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], text: Float[Array, "B T D"]
    ) -> Float[Array, "B H W C"]:
        y = GroupNorm(self.groups, 1e-6, name="norm")(x).reshape(x.shape[0], -1, x.shape[-1])
        y = nn.Dense(x.shape[-1], name="proj_in")(y)
        for i in range(self.depth):
            y = _TransformerBlock(self.heads, name=f"transformer_blocks.{i}")(y, text)
        return x + nn.Dense(x.shape[-1], name="proj_out")(y).reshape(x.shape)


def downsample(features: int, name: str, padding: tuple[int, int] = (1, 1)) -> Conv:
    """Half the height and width."""
    return Conv(features, 2, padding, name=f"{name}.downsamplers.0.conv")


def upsample(x: Float[Array, "B H W C"], size: Sequence[int], name: str) -> Float[Array, "B ..."]:
    """The nearest place of x for each of `size`, then a convolution; call it in a module."""
    for axis, (new, old) in enumerate(zip(size, x.shape[1:3], strict=True), 1):
        if new == 2 * old:
            x = jnp.repeat(x, 2, axis=axis)
        else:  # of latents whose sides are no multiples
            x = jnp.take(x, jnp.arange(new) * old // new, axis=axis)
    return Conv(x.shape[-1], name=f"{name}.upsamplers.0.conv")(x)
