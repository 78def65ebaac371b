"""Images with their labels, the space of models of them, and batches of them.

Files hold whole numbers 0 .. 255; a model sees -1 .. 1. Arrays are channels last.

Legend: N images, B batch; H, W, C height, width and channels.
"""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from common_jax import struct
from common_jax.errors import InputError
from reward_jax.data.grids import GridSpace
from reward_jax.data.model import SpaceGuide, SpaceModel

__all__ = [
    "ImageGuide",
    "ImageModel",
    "ImageRows",
    "ImageSpace",
    "Images",
    "LabelledRows",
    "scaled",
    "tiled",
    "unscaled",
]


def scaled(
    pixels: UInt8[np.ndarray, "..."] | UInt8[Array, "..."],
) -> Float[np.ndarray, "..."] | Float[Array, "..."]:
    """0 .. 255 as -1 .. 1, float32."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def unscaled(x: Float[np.ndarray, "..."] | Float[Array, "..."]) -> UInt8[np.ndarray, "..."]:
    """-1 .. 1 as 0 .. 255, rounded; what lies beyond is cut off."""
    return np.clip(np.rint((np.asarray(x) + 1) * 127.5), 0, 255).astype(np.uint8)


def tiled(images: UInt8[np.ndarray, "N H W C"], columns: int) -> UInt8[np.ndarray, "h w C"]:
    """Images side by side, as one; what is missing of the last row is black."""
    rows = max(1, -(-len(images) // columns))
    height, width, channels = images.shape[1:]
    whole = np.zeros((rows * columns, height, width, channels), np.uint8)
    whole[: len(images)] = images
    whole = whole.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return whole.reshape(rows * height, columns * width, channels)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """A set of images.

    pixels: 0 .. 255. labels: each image's class, a number in `classes`; None where there are none.
    classes: their names. source: where they came from, in messages.
    """

    pixels: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, " N"] | None
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.pixels)

    def choose(self, index: Int[np.ndarray, " n"] | slice) -> "Images":
        """Some of them."""
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, pixels=self.pixels[index], labels=labels)

    def numbers(self, classes: Collection[str]) -> list[int]:
        """The numbers of classes; raises InputError for a name that is none."""
        for name in classes:
            if name not in self.classes:
                known = ", ".join(self.classes) or "none"
                raise InputError(f"{self.source}: has no class {name!r}; its classes are {known}")
        return [self.classes.index(name) for name in classes]

    def known_labels(self) -> Int[np.ndarray, " N"]:
        """The labels; raises InputError where there are none."""
        if self.labels is None:
            raise InputError(
                f"{self.source}: has no labels: give a file of them, or a folder for each class"
            )
        return self.labels


@struct.dataclass
class ImageRows:
    """A source of batches (`diffusion/sources.py`) that holds the images as bytes."""

    pixels: UInt8[Array, "N H W C"]

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count H W C"]:
        """See `Source`."""
        rows = jax.random.randint(key, (count,), 0, self.pixels.shape[0])
        return jnp.asarray(scaled(self.pixels[rows]))


@struct.dataclass
class LabelledRows:
    """The same of images with their labels, which are the condition of a model of classes."""

    pixels: UInt8[Array, "N H W C"]
    labels: Int[Array, " N"]

    def sample(
        self, key: Key[Array, ""], count: int
    ) -> tuple[Float[Array, "count H W C"], Int[Array, " count"]]:
        """See `Source`."""
        rows = jax.random.randint(key, (count,), 0, self.pixels.shape[0])
        return jnp.asarray(scaled(self.pixels[rows])), self.labels[rows]


class ImageSpace(GridSpace):
    """Images of one size."""

    def plans(
        self, x: Float[Array, "B H W C"] | Float[np.ndarray, "B H W C"]
    ) -> UInt8[np.ndarray, "B H W C"]:
        """Samples of a model in the world's own units, 0 .. 255.

        Raises InputError for samples that are not finite.
        """
        if not np.isfinite(found := np.asarray(x)).all():
            raise InputError(
                "samples are not finite: lower guidance.scale, or train the models again where "
                "unsteered ones are not, too"
            )
        return unscaled(found)


ImageModel = SpaceModel[ImageSpace]
ImageGuide = SpaceGuide[ImageSpace]
