"""Options of images: how they are read, and the networks of their denoisers and rewards."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from common_jax.cli.ranges import PositiveInt
from common_jax.errors import InputError
from reward_jax.data.images.pixels import ImageSpace
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.models.unet2d.unet import UNet2D

__all__ = [
    "ClassUNetOptions",
    "HalfUNetOptions",
    "ImageOptions",
    "UNetOptions",
    "check_network",
]


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """How images are read.

    Args:
        size: sides of the images of a folder, scaled and cut; by default they are of one size.
        channels: of the images of a folder: 1 for grey, or 3; by default 3.
        classes: names of the labels of IDX files; their numbers by default.
        leave_out: classes that are not learned: what an expert lacks.
    """

    size: PositiveInt | None = None
    channels: Literal[1, 3] | None = None
    classes: tuple[str | int, ...] = ()  # of a command line, a name of digits is a number
    leave_out: tuple[str | int, ...] = ()


@dataclasses.dataclass(frozen=True)
class UNetOptions:
    """A denoiser of images: fields of `UNet2D`, with its defaults.

    Args:
        dim: channels of the first level.
        multipliers: channels of each level, in units of dim.
        blocks: residual blocks of a level.
        attention: levels that have attention, by the longer side of their positions.
        patch: patches of patch x patch pixels are the positions of the first level.
    """

    dim: PositiveInt = UNet2D.dim
    multipliers: tuple[PositiveInt, ...] = UNet2D.multipliers
    blocks: PositiveInt = UNet2D.blocks
    attention: tuple[PositiveInt, ...] = UNet2D.attention
    patch: PositiveInt = UNet2D.patch

    def make(self, space: ImageSpace) -> UNet2D:
        """The module, for images of that space."""
        return UNet2D(
            space.channels,
            self.dim,
            tuple(self.multipliers),
            self.blocks,
            tuple(self.attention),
            patch=self.patch,
        )


@dataclasses.dataclass(frozen=True)
class ClassUNetOptions(UNetOptions):
    """The same, also of labels.

    Args:
        by_class: labels are the condition, and left out of a tenth of the rows (classifier-free
            guidance, arXiv 2207.12598); where none is given the model is one of all classes.
    """

    by_class: bool = False

    def make(self, space: ImageSpace) -> UNet2D:
        """The module, for images of that space, whose `about` names the classes."""
        made = super().make(space)
        return made.clone(classes=len(space.about["classes"])) if self.by_class else made


@dataclasses.dataclass(frozen=True)
class HalfUNetOptions:
    """A reward of images: fields of `HalfUNet2D`, with its defaults.

    Args:
        kind: half_unet, or energy (the difference of both denoisers' energies, which begins as
            they are).
        dim: channels of the first level.
        multipliers: channels of each level, in units of dim.
        blocks: residual blocks of a level.
        patch: patches of patch x patch pixels are the positions of the first level.
    """

    kind: Literal["half_unet", "energy"] = "half_unet"
    dim: PositiveInt = HalfUNet2D.dim
    multipliers: tuple[PositiveInt, ...] = HalfUNet2D.multipliers
    blocks: PositiveInt = HalfUNet2D.blocks
    patch: PositiveInt = HalfUNet2D.patch

    def make(self, space: ImageSpace) -> HalfUNet2D:
        """The module, for images of that space; of an energy there is none."""
        return HalfUNet2D(
            space.channels, self.dim, tuple(self.multipliers), self.blocks, patch=self.patch
        )


def check_network(name: str, options: UNetOptions | HalfUNetOptions, space: ImageSpace) -> None:
    """InputError, after `name`, for a network that images do not go through; computes nothing."""
    x, t = jax.ShapeDtypeStruct((1, *space.shape), jnp.float32), jnp.zeros(1, jnp.int32)
    try:
        jax.eval_shape(options.make(space).init, jax.random.key(0), x, t)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
