"""The autoencoder of Stable Diffusion: diffusers' AutoencoderKL, channels last.

Legend: B batch, H and W height and width of images, h and w of latents, C channels of latents.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from common_jax.precision import precise
from reward_jax.models.stable_diffusion.config import VAEConfig
from reward_jax.models.stable_diffusion.layers import (
    Conv,
    GroupNorm,
    Resnet,
    attention,
    downsample,
    upsample,
)

__all__ = ["Decoder", "Encoder"]

_EPSILON = 1e-6


def _resnet(c: VAEConfig, name: str, features: int) -> Resnet:
    return Resnet(features, c.groups, _EPSILON, name=name)


class _Attention(nn.Module):
    """Residual attention of one head over all places."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "B h w F"]) -> Float[Array, "B h w F"]:
        y = GroupNorm(self.groups, _EPSILON, name="group_norm")(x)
        y = y.reshape(x.shape[0], -1, x.shape[-1])
        return x + attention(y, y, heads=1, bias=True).reshape(x.shape)


def _middle(c: VAEConfig, x: Float[Array, "B h w F"], name: str) -> Float[Array, "B h w F"]:
    x = _resnet(c, f"{name}.mid_block.resnets.0", c.channels[-1])(x)
    if c.middle_attention:
        x = _Attention(c.groups, name=f"{name}.mid_block.attentions.0")(x)
    return _resnet(c, f"{name}.mid_block.resnets.1", c.channels[-1])(x)


def _out(c: VAEConfig, x: Array, name: str, features: int) -> Array:
    x = GroupNorm(c.groups, _EPSILON, name=f"{name}.conv_norm_out")(x)
    return Conv(features, name=f"{name}.conv_out")(jax.nn.silu(x))


class Encoder(nn.Module):
    """Images to the mean and the logarithm of the variance of latents, not scaled."""

    config: VAEConfig

    @nn.compact
    @precise
    def __call__(
        self, images: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
        c = self.config
        x = Conv(c.channels[0], name="encoder.conv_in")(images)
        for level, features in enumerate(c.channels):
            name = f"encoder.down_blocks.{level}"
            for i in range(c.layers):
                x = _resnet(c, f"{name}.resnets.{i}", features)(x)
            if level < len(c.channels) - 1:
                x = downsample(features, name, (0, 1))(x)
        x = _out(c, _middle(c, x, "encoder"), "encoder", 2 * c.latent_channels)
        if c.quantised[0]:
            x = nn.Dense(2 * c.latent_channels, name="quant_conv")(x)
        mean, log_variance = jnp.split(x, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30, 20)


class Decoder(nn.Module):
    """Latents, not scaled, to images."""

    config: VAEConfig

    @nn.compact
    @precise
    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        c, x = self.config, latents
        if c.quantised[1]:
            x = nn.Dense(c.latent_channels, name="post_quant_conv")(x)
        x = _middle(c, Conv(c.channels[-1], name="decoder.conv_in")(x), "decoder")
        for up, features in enumerate(reversed(c.channels)):
            name = f"decoder.up_blocks.{up}"
            for i in range(c.layers + 1):
                x = _resnet(c, f"{name}.resnets.{i}", features)(x)
            if up < len(c.channels) - 1:
                x = upsample(x, (2 * x.shape[1], 2 * x.shape[2]), name)
        return _out(c, x, "decoder", c.image_channels)
