"""A folder of images, PNG or JPEG: all of one class, or a folder for each class.

Legend: N images; H, W, C height, width and channels.
"""

import pathlib
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from common_jax.errors import InputError
from reward_jax.data.images.pixels import Images

__all__ = ["SUFFIXES", "read_folder"]

SUFFIXES = (".png", ".jpg", ".jpeg")


def read_folder(
    folder: str | pathlib.Path, *, size: int | None = None, channels: Literal[1, 3] = 3
) -> Images:
    """The images of a folder, in the order of their names.

    Images in the folder itself have no labels; those in its folders, each a class, have. Hidden
    files and those that are neither PNG nor JPEG are passed over. size: the shorter side is scaled
    to it, and the centre cut out; None where all are of one size already. channels: 3, or 1 for
    grey. What is transparent stands on white.

    Raises InputError, one line that names the file, for an image that cannot be read, is of
    another size than the first, or has more than 8 bits; and for a folder without any.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a folder of images is wanted")
    if size is not None and size < 1:
        raise InputError(f"size must be 1 or more, not {size}")
    if channels not in (1, 3):
        raise InputError(f"channels must be 1 or 3, not {channels!r}")
    own = _images(folder)
    classes = [one for one in _visible(folder) if one.is_dir() and _images(one)]
    if own and classes:
        raise InputError(
            f"{folder}: has images of its own and folders of images ({classes[0].name}): put all "
            "into folders, one for each class, or none"
        )
    if not own and not classes:
        raise InputError(f"{folder}: holds no image ({', '.join(SUFFIXES)})")
    of_class = [own] if own else [_images(one) for one in classes]
    paths = [path for found in of_class for path in found]
    first = _read(paths[0], size, channels)
    pixels = np.empty((len(paths), *first.shape), np.uint8)
    for row, path in enumerate(paths):
        found = _read(path, size, channels)
        if found.shape != first.shape:
            raise InputError(
                f"{path}: is {_size(found)}, but {paths[0].name} {_size(first)}: give size, to "
                "which all are scaled and cut"
            )
        pixels[row] = found
    if own:
        return Images(pixels, None, (), str(folder))
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(x) for x in of_class])
    return Images(pixels, labels, tuple(one.name for one in classes), str(folder))


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in _visible(folder) if p.suffix.lower() in SUFFIXES and p.is_file()]


def _size(pixels: UInt8[np.ndarray, "H W C"]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def _read(path: pathlib.Path, size: int | None, channels: int) -> UInt8[np.ndarray, "H W C"]:
    from PIL import Image, ImageOps  # a command that reads none starts the quicker

    try:
        with Image.open(path) as opened:
            if opened.mode[:1] in "IF":
                raise InputError(f"{path}: has more than 8 bits a value; save it with 8")
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:  # `convert` would show the colours that it hides
                own = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", own.size, "white"), own)
            image = image.convert("RGB" if channels == 3 else "L")
    except InputError:
        raise
    # A bomb: more pixels than Pillow reads. SyntaxError: of a PNG whose chunks are damaged.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: cannot be read as an image ({reason}); mend or remove it"
        ) from (error)
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    found = np.asarray(image, np.uint8)
    return found if channels == 3 else found[..., None]
