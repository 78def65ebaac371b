"""A set to learn from and one held out, of a folder in either of two layouts.

train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-..., t10k-labels-...
    IDX files as MNIST and its kin have them, each plain or with .gz
train/CLASS/*.png, test/CLASS/*.png
    images, PNG or JPEG, in a folder for each class
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

from common_jax.errors import InputError
from reward_jax.data.images.folder import read_folder
from reward_jax.data.images.idx import find_idx, read_idx
from reward_jax.data.images.pixels import Images

__all__ = ["read_sets"]

_PARTS = {"train": "train", "test": "t10k"}
_KINDS = "images-idx3-ubyte", "labels-idx1-ubyte"


def read_sets(
    folder: str | pathlib.Path,
    *,
    classes: Sequence[str] = (),
    size: int | None = None,
    channels: Literal[1, 3] = 1,
) -> tuple[Images, Images]:
    """Both sets, of one size and of the same classes.

    classes: names of the labels of IDX files. size, channels: of images (`read_folder`). Raises
    InputError as `read_idx` and `read_folder` do, where the two differ, and for what the layout
    has itself: IDX files a size and channels, folders their names.
    """
    folder = pathlib.Path(folder)
    found = [find_idx(folder, f"{part}-{_KINDS[0]}") for part in _PARTS.values()]
    if any(found):
        if size is not None or channels != 1:
            raise InputError(
                f"{folder}: IDX files are of one size, and grey: leave size and channels out"
            )
        train, test = (_idx(folder, part, classes) for part in _PARTS.values())
        names = max(train.classes, test.classes, key=len)
        train, test = (dataclasses.replace(one, classes=names) for one in (train, test))
    elif all((folder / part).is_dir() for part in _PARTS):
        if classes:
            raise InputError(f"{folder}: its folders are the classes: leave classes out")
        train, test = (read_folder(folder / part, size=size, channels=channels) for part in _PARTS)
    else:
        raise InputError(
            f"{folder}: holds neither {_PARTS['train']}-{_KINDS[0]}[.gz] and its three kin, nor "
            "the folders train and test"
        )
    sizes = [" x ".join(map(str, one.pixels.shape[1:])) for one in (train, test)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{folder}: its two sets are of {sizes[0]} and {sizes[1]} values")
    if train.classes != test.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise InputError(f"{folder}: only one of its two sets has the classes {odd}")
    return train, test


def _idx(folder: pathlib.Path, part: str, classes: Sequence[str]) -> Images:
    images, labels = (find_idx(folder, f"{part}-{kind}") for kind in _KINDS)
    for kind, path in zip(_KINDS, (images, labels), strict=True):
        if path is None:
            raise InputError(
                f"{folder / part}-{kind}[.gz]: no such file; it belongs to the others"
            )
    assert images is not None
    return read_idx(images, labels, classes)
