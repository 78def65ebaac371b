"""A U-Net of images, unconditional or of classes (Ho et al. 2020; Dhariwal and Nichol 2021).

Legend: B batch, H and W rows and columns, C channels, E width of the time embedding.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from common_jax.errors import InputError
from reward_jax.models.temporal.layers import TimeEmbedding
from reward_jax.models.unet2d.layers import (
    Attention,
    Conv,
    Norm,
    ResidualBlock,
    Upsample,
    check_images,
    from_patches,
    to_patches,
)

__all__ = ["UNet2D"]


class UNet2D(nn.Module):
    """The U-Net, of images of any size whose sides `patch` divides.

    A level has half the sides of the one above it, rounded up. Of images in patches of 4 x 4 the
    defaults are what two CPU cores carry; on accelerators, patch 1 or 2 and three or four levels.

    Attributes:
        channels: C.
        dim: channels of the first level, and width of the time embedding.
        multipliers: channels of each level, in units of dim.
        blocks: residual blocks of a level, on the way down and on the way up.
        attention: the levels that have attention, by the longer side of their positions, as [7]
            of images of 28 x 28 in patches of 4 x 4.
        heads: of attention.
        groups: of the group norms, a divisor of every level's channels.
        patch: patches of patch x patch pixels are the positions of the first level.
        classes: labels 0 .. classes - 1 are the condition, and `null` stands for none of them;
            None: no condition.

    Raises InputError for images of other channels, sides that the patch does not divide, and a
    size of attention that no level has.
    """

    channels: int
    dim: int = 64
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = ()
    heads: int = 4
    groups: int = 8
    patch: int = 4
    classes: int | None = None

    @property
    def null(self) -> int:
        """The label that stands for none, of classifier-free guidance and `drop_condition`."""
        if self.classes is None:
            raise InputError("a network without classes has no null class: give classes")
        return self.classes

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Int[Array, " B"],
        cond: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B H W C"]:
        check_images(x, self.channels, self.patch)
        if not self.multipliers or self.blocks < 1:
            raise InputError("a U-Net needs multipliers, one a level, and a block or more a level")
        labels = self._labels(cond, x.shape[0])
        time = TimeEmbedding(self.dim, "silu", name="time")(t)
        if self.classes is not None:
            time = time + nn.Embed(self.classes + 1, self.dim, name="classes")(labels)
        x = Conv(self.dim, name="in")(to_patches(x, self.patch))
        sides = _sides(max(x.shape[1:3]), len(self.multipliers))
        if strange := sorted(set(self.attention) - set(sides)):
            raise InputError(
                f"attention at {strange}, but the levels' longer sides are {sides}: give some "
                "of these"
            )
        widths = [self.dim * m for m in self.multipliers]
        skips = []
        for level, width in enumerate(widths):
            if level:
                x = Conv(x.shape[-1], 3, 2, name=f"down_{level}_sample")(x)
            x = self._blocks(x, time, width, f"down_{level}")
            skips.append(x)
        x = self._blocks(x, time, widths[-1], "middle")
        for level, width in reversed(list(enumerate(widths))):
            x = jnp.concatenate([x, skips.pop()], -1)
            x = self._blocks(x, time, width, f"up_{level}")
            if level:
                size = skips[-1].shape[1:3]
                x = Upsample(width, size, name=f"up_{level}_sample")(x)
        x = nn.silu(Norm(self.groups, name="norm")(x))
        x = Conv(self.patch**2 * self.channels, name="out")(x)
        return from_patches(x, self.patch)

    def _labels(self, cond: Int[Array, " B"] | None, rows: int) -> Int[Array, " B"] | None:
        """The condition, or the null class of every row; None for a network without classes."""
        if self.classes is None:
            if cond is not None:
                raise InputError(
                    "a condition was given to a U-Net without classes: give it classes, or leave "
                    "the condition out"
                )
            return None
        if cond is None:
            return jnp.full(rows, self.classes)
        check_labels(cond, self.classes, rows)
        return cond

    def _blocks(
        self, x: Float[Array, "B H W C"], time: Float[Array, "B E"], width: int, name: str
    ) -> Float[Array, "B H W F"]:
        for block in range(self.blocks):
            made = ResidualBlock(width, self.groups, name=f"{name}_{block}")
            x = made(x, time)
            if max(x.shape[1:3]) in self.attention:
                x = Attention(self.heads, self.groups, name=f"{name}_{block}_attention")(x)
        return x


def _sides(first: int, levels: int) -> list[int]:
    """The longer side of each level."""
    return [-(-first // 2**level) for level in range(levels)]


def check_labels(labels: Int[Array, " B"], classes: int, rows: int) -> None:
    """Raise InputError for what is no label of each row; values are looked at where known."""
    if labels.shape != (rows,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"the condition is {labels.dtype} of shape {list(labels.shape)}: give a label, a "
            f"whole number of 0 to {classes}, for each of the {rows} images"
        )
    if isinstance(labels, Tracer):
        return
    found = np.asarray(labels)
    if found.size and not (0 <= found.min() and found.max() <= classes):
        raise InputError(
            f"labels are {found.min()} to {found.max()}: give 0 to {classes - 1}, or {classes} "
            "for none"
        )
