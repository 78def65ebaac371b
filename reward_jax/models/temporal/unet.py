"""The temporal U-Net of Diffuser (Janner et al. 2022), which denoises trajectories.

Legend: B batch, H horizon, D transition width, E width of the time embedding.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from common_jax.errors import InputError
from reward_jax.models.conv import Method
from reward_jax.models.temporal.layers import (
    Conv,
    ConvBlock,
    Downsample,
    LinearAttention,
    ResidualBlock,
    TimeEmbedding,
    Upsample,
    check_trajectories,
)

__all__ = ["TemporalUnet"]


class TemporalUnet(nn.Module):
    """The U-Net; H must be a multiple of 2 ** (levels - 1), or it raises InputError.

    Defaults are what two CPU cores carry; Diffuser's are dim 32 and multipliers (1, 2, 4, 8).

    Attributes:
        transition: D.
        dim: channels of the first level, and width of the time embedding.
        multipliers: channels of each level, in units of dim.
        attention: linear attention after each level.
        method: of convolutions (`models/conv.py`).
    """

    transition: int
    dim: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4)
    attention: bool = False
    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H D"], t: Int[Array, " B"]) -> Float[Array, "B H D"]:
        check_trajectories(x)
        levels = len(self.multipliers)
        if not levels:
            raise InputError("a U-Net needs multipliers, one a level")
        if x.shape[1] % 2 ** (levels - 1):
            raise InputError(
                f"a U-Net of {levels} levels needs a horizon that is a multiple of "
                f"{2 ** (levels - 1)}, not {x.shape[1]}"
            )
        time = TimeEmbedding(self.dim, name="time")(t)
        widths = [self.dim * m for m in self.multipliers]
        skips = []
        for level, width in enumerate(widths):
            x = self._pair(x, time, width, f"down_{level}")
            skips.append(x)
            if level < levels - 1:
                x = Downsample(method=self.method, name=f"down_{level}_sample")(x)
        x = ResidualBlock(widths[-1], method=self.method, name="middle_0")(x, time)
        if self.attention:
            x = LinearAttention(name="middle_attention")(x)
        x = ResidualBlock(widths[-1], method=self.method, name="middle_1")(x, time)
        for level, width in enumerate(widths[-2::-1]):
            x = jnp.concatenate([x, skips.pop()], -1)
            x = self._pair(x, time, width, f"up_{level}")
            x = Upsample(method=self.method, name=f"up_{level}_sample")(x)
        x = ConvBlock(self.dim, method=self.method, name="final")(x)
        return Conv(self.transition, 1, name="out")(x)

    def _pair(
        self, x: Float[Array, "B T C"], time: Float[Array, "B E"], width: int, name: str
    ) -> Float[Array, "B T F"]:
        x = ResidualBlock(width, method=self.method, name=f"{name}_0")(x, time)
        x = ResidualBlock(width, method=self.method, name=f"{name}_1")(x, time)
        return LinearAttention(name=f"{name}_attention")(x) if self.attention else x
