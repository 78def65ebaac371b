"""Layers of the image networks, channels last.

Legend: B batch, H and W rows and columns, C channels of the input, F of the output, P side of a
patch, E width of the time embedding, S positions (H W).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common_jax.errors import InputError
from reward_jax.models.conv import conv2d, conv2d_doubled
from reward_jax.models.temporal.layers import GroupNorm

__all__ = [
    "Attention",
    "Conv",
    "Norm",
    "ResidualBlock",
    "Upsample",
    "check_images",
    "from_patches",
    "to_patches",
]


def check_images(x: Float[Array, "B H W C"], channels: int, patch: int) -> None:
    """Raise InputError for an x that is no batch of images of these channels, cut into patches."""
    if x.ndim != 4:
        raise InputError(
            f"x_t has shape {list(x.shape)}, not [B, H, W, C]: this network is one of images"
        )
    if x.shape[-1] != channels:
        raise InputError(
            f"images of {list(x.shape[1:])} (H, W, C) have {x.shape[-1]} channels, and this "
            f"network is one of {channels}: give it images of {channels}, channels last"
        )
    if patch < 1 or x.shape[1] % patch or x.shape[2] % patch:
        raise InputError(
            f"images of {x.shape[1]} x {x.shape[2]} cannot be cut into patches of {patch} x "
            f"{patch}: give a patch that divides both sides"
        )


def to_patches(x: Float[Array, "B H W C"], patch: int) -> Float[Array, "B H/P W/P P*P*C"]:
    """Each patch of P x P pixels as one position, its pixels side by side as channels."""
    rows, height, width, channels = x.shape
    cut = x.reshape(rows, height // patch, patch, width // patch, patch, channels)
    return cut.swapaxes(2, 3).reshape(rows, height // patch, width // patch, -1)


def from_patches(x: Float[Array, "B H/P W/P P*P*C"], patch: int) -> Float[Array, "B H W C"]:
    """What `to_patches` cut."""
    rows, height, width, _ = x.shape
    cut = x.reshape(rows, height, width, patch, patch, -1).swapaxes(2, 3)
    return cut.reshape(rows, height * patch, width * patch, -1)


class Conv(nn.Module):
    """Convolution (`models/conv.py`) of `size` x `size` taps, padded to keep the sides.

    With a stride of 2 the sides are halved, and rounded up.
    """

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B U V F"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        y = conv2d(x, kernel, stride=self.stride, padding=(self.size - 1) // 2)
        return y + bias[None, None, None]


class Upsample(nn.Module):
    """Each position four times, cut to `size`, then a convolution of 3 x 3 taps."""

    features: int
    size: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B U V F"]:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        y = conv2d_doubled(x, kernel, self.size)
        return y + bias[None, None, None]


class Norm(nn.Module):
    """Group norm over all positions and the channels of a group."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        return GroupNorm(self.groups, name="group")(flat).reshape(x.shape)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, the time embedding added between; and a shortcut."""

    features: int
    groups: int = 8

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], time: Float[Array, "B E"]
    ) -> Float[Array, "B H W F"]:
        y = nn.silu(Norm(self.groups, name="norm_first")(x))
        y = Conv(self.features, name="first")(y)
        y = y + nn.Dense(self.features, name="time")(nn.silu(time))[:, None, None]
        y = nn.silu(Norm(self.groups, name="norm_second")(y))
        y = Conv(self.features, name="second")(y)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, name="shortcut")(x)
        return y + x


class Attention(nn.Module):
    """Residual attention over all positions, x + attention(norm(x)); heads of equal widths."""

    heads: int = 4
    groups: int = 8

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        rows, height, width, channels = x.shape
        if channels % self.heads:
            raise InputError(
                f"attention of {channels} channels has no {self.heads} equal heads: give the "
                f"network a dim that {self.heads} divides"
            )
        flat = Norm(self.groups, name="norm")(x).reshape(rows, height * width, channels)
        parts = nn.Dense(3 * channels, name="qkv")(flat)
        q, k, v = jnp.moveaxis(
            parts.reshape(rows, -1, 3, self.heads, channels // self.heads), 2, 0
        )
        # By XLA's own operations: extraction differentiates twice, which kernels do not offer.
        out = jax.nn.dot_product_attention(q, k, v, implementation="xla")
        return x + nn.Dense(channels, name="out")(out.reshape(x.shape))
