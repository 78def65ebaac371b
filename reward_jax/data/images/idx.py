"""Images and labels in IDX files, as MNIST and its kin come in them, gzipped or plain.

A file is two zero bytes, a byte of the type (8: unsigned bytes), a byte of the number of axes, the
axes' sizes as big-endian 32-bit numbers, and the values, the last axis fastest.

Legend: N images; H, W height and width.
"""

import gzip
import math
import pathlib
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from common_jax.errors import InputError
from reward_jax.data.images.pixels import Images

__all__ = ["find_idx", "read_idx"]

_BYTES = 8  # the type of unsigned bytes
_RATIO = 1032  # bytes that a byte of deflate can unfold to, at most
_GZIP = b"\x1f\x8b"


def read_idx(
    images: str | pathlib.Path,
    labels: str | pathlib.Path | None = None,
    classes: Sequence[str] = (),
) -> Images:
    """Images [N, H, W], and their labels [N]; classes: names, else the labels' numbers.

    Raises InputError, one line that names the file, for one that is missing, cut short, too long,
    no IDX file of bytes, or without images, and for labels that do not fit.
    """
    pixels = _read(images, 3)
    if not pixels.size:
        raise InputError(f"{images}: holds no images ({' x '.join(map(str, pixels.shape))})")
    found = None
    if labels is not None:
        found = _read(labels, 1).astype(np.int32)
        if len(found) != len(pixels):
            raise InputError(
                f"{labels}: holds {len(found):,} labels, but {images} {len(pixels):,} images: "
                "give files of one set"
            )
        classes = classes or [str(number) for number in range(int(found.max()) + 1)]
        if found.max() >= len(classes):
            raise InputError(
                f"{labels}: has the label {found.max()}, but {len(classes)} classes are named "
                f"(0 to {len(classes) - 1})"
            )
    return Images(pixels[..., None], found, tuple(classes), str(images))


def find_idx(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """The file of a name in a folder, plain or gzipped; None where it is not there."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _read(path: str | pathlib.Path, axes: int) -> UInt8[np.ndarray, "..."]:
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; an IDX file is wanted")
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP
        held = path.stat().st_size
        with gzip.open(path) if packed else path.open("rb") as file:
            return _values(path, file, axes, held * _RATIO if packed else held)
    except (OSError, EOFError, zlib.error) as error:  # of gzip: no gzip, cut short, damaged
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read ({reason}); copy or fetch it again") from error


def _values(path: pathlib.Path, file: Any, axes: int, most: int) -> UInt8[np.ndarray, "..."]:
    """most: bytes that the file can hold at the most."""
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0":
        raise InputError(f"{path}: is no IDX file (it begins with {head.hex() or 'nothing'})")
    if head[2] != _BYTES:
        raise InputError(f"{path}: its values are of type {head[2]:#04x}, not bytes (0x08)")
    if head[3] != axes:
        what = {1: "labels", 3: "images"}
        raise InputError(
            f"{path}: has {head[3]} axes, {what.get(head[3], 'something else')}, where "
            f"{what[axes]} are wanted, which have {axes}"
        )
    sizes = file.read(4 * axes)
    if len(sizes) < 4 * axes:
        raise InputError(f"{path}: is cut short; copy or fetch it again")
    shape = struct.unpack(f">{axes}I", sizes)
    count = math.prod(shape)
    values = file.read(count + 1) if count <= most else b""
    if len(values) != count:
        found = "more" if len(values) > count else "fewer"
        raise InputError(
            f"{path}: declares {' x '.join(f'{n:,}' for n in shape)} bytes, but holds {found}; "
            "copy or fetch it again"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)
