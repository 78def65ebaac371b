"""The denoiser of Stable Diffusion: diffusers' UNet2DConditionModel, channels last.

Legend: B batch, h and w height and width of latents, C their channels, T tokens, D width of the
text, E width of the time embedding.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from common_jax.precision import precise
from reward_jax.models.stable_diffusion.config import UNetConfig
from reward_jax.models.stable_diffusion.layers import (
    Conv,
    GroupNorm,
    Resnet,
    Transformer,
    downsample,
    upsample,
)

__all__ = ["UNet"]


class UNet(nn.Module):
    """What the model predicts, epsilon or v, of noised latents at a step and a text."""

    config: UNetConfig

    @nn.compact
    @precise
    def __call__(
        self, x_t: Float[Array, "B h w C"], t: Int[Array, " B"], text: Float[Array, "B T D"]
    ) -> Float[Array, "B h w C"]:
        c, levels = self.config, range(len(self.config.channels))
        dtype = text.dtype
        time = nn.Dense(c.time_width, name="time_embedding.linear_1")(_sinusoids(c, t, dtype))
        time = nn.Dense(c.time_width, name="time_embedding.linear_2")(jax.nn.silu(time))
        x = Conv(c.channels[0], name="conv_in")(x_t.astype(dtype))
        skips = [x]

        def resnet(name: str, features: int) -> Resnet:
            return Resnet(features, c.groups, c.epsilon, name=name)

        def transformer(name: str, level: int) -> Transformer:
            return Transformer(c.heads[level], c.depth[level], c.groups, name=name)

        for level in levels:
            name, features = f"down_blocks.{level}", c.channels[level]
            for i in range(c.layers[level]):
                x = resnet(f"{name}.resnets.{i}", features)(x, time)
                if c.attention[0][level]:
                    x = transformer(f"{name}.attentions.{i}", level)(x, text)
                skips.append(x)
            if level < levels[-1]:
                x = downsample(features, name)(x)
                skips.append(x)
        x = resnet("mid_block.resnets.0", c.channels[-1])(x, time)
        x = transformer("mid_block.attentions.0", levels[-1])(x, text)
        x = resnet("mid_block.resnets.1", c.channels[-1])(x, time)
        for up, level in enumerate(reversed(levels)):
            name, features = f"up_blocks.{up}", c.channels[level]
            for i in range(c.layers[level] + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = resnet(f"{name}.resnets.{i}", features)(x, time)
                if c.attention[1][up]:
                    x = transformer(f"{name}.attentions.{i}", level)(x, text)
            if level > 0:
                x = upsample(x, skips[-1].shape[1:3], name)
        x = jax.nn.silu(GroupNorm(c.groups, c.epsilon, name="conv_norm_out")(x))
        return Conv(c.in_channels, name="conv_out")(x).astype(x_t.dtype)


def _sinusoids(c: UNetConfig, t: Int[Array, " B"], dtype: jnp.dtype) -> Float[Array, "B E"]:
    width = c.channels[0]
    half = width // 2
    rates = jnp.exp(
        jnp.arange(half, dtype=jnp.float32) * (-math.log(10000) / (half - c.frequency_shift))
    )
    angles = t.astype(jnp.float32)[:, None] * rates[None]
    both = jnp.sin(angles), jnp.cos(angles)
    x = jnp.concatenate(both[::-1] if c.cosine_first else both, axis=-1)
    return jnp.pad(x, ((0, 0), (0, width - 2 * half))).astype(dtype)
