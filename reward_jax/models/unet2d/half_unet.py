"""A reward of images: the downsampling half of the U-Net, its mean over positions, a linear head.

Legend: B batch, H and W rows and columns, C channels.
"""

from flax import linen as nn
from jaxtyping import Array, Float, Int

from common_jax.errors import InputError
from reward_jax.models.temporal.layers import TimeEmbedding
from reward_jax.models.unet2d.layers import Conv, Norm, ResidualBlock, check_images, to_patches

__all__ = ["HalfUNet2D"]


class HalfUNet2D(nn.Module):
    """A number an image, of any size whose sides `patch` divides.

    Attributes:
        channels: C.
        dim: channels of the first level, and width of the time embedding.
        multipliers: channels of each level, in units of dim; it has half the sides of the one
            above it, rounded up.
        blocks: residual blocks of a level.
        groups: of the group norms, a divisor of every level's channels.
        patch: patches of patch x patch pixels are the positions of the first level.

    Raises InputError for images of other channels, and sides that the patch does not divide.
    """

    channels: int
    dim: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    groups: int = 8
    patch: int = 4

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], t: Int[Array, " B"]) -> Float[Array, " B"]:
        check_images(x, self.channels, self.patch)
        if not self.multipliers or self.blocks < 1:
            raise InputError(
                "a half U-Net needs multipliers, one a level, and a block or more a level"
            )
        time = TimeEmbedding(self.dim, "silu", name="time")(t)
        x = Conv(self.dim, name="in")(to_patches(x, self.patch))
        for level, multiplier in enumerate(self.multipliers):
            if level:
                x = Conv(x.shape[-1], 3, 2, name=f"down_{level}_sample")(x)
            for block in range(self.blocks):
                made = ResidualBlock(
                    self.dim * multiplier, self.groups, name=f"down_{level}_{block}"
                )
                x = made(x, time)
        pooled = nn.silu(Norm(self.groups, name="norm")(x)).mean((1, 2))
        return nn.Dense(1, name="head")(pooled)[:, 0]
