"""Images to learn from, whatever they are kept in.

FOLDER/*.png                    images, PNG or JPEG
FOLDER/CLASS/*.png              in a folder for each class
FOLDER/train, FOLDER/test       either of the two, and a set that is held out
FOLDER/train-images-idx3-ubyte, its labels and its t10k kin (`sets.py`)
X-images-idx3-ubyte             an IDX file, with X-labels-idx1-ubyte beside it or without
"""

import pathlib
from collections.abc import Sequence
from typing import Literal

from common_jax.errors import InputError
from reward_jax.data.images.folder import SUFFIXES, read_folder
from reward_jax.data.images.idx import find_idx, read_idx
from reward_jax.data.images.pixels import Images, ImageSpace
from reward_jax.data.images.sets import read_sets

__all__ = ["holds_images", "read_images", "read_like"]

_IDX = "-images-idx3-ubyte"


def holds_images(source: str | pathlib.Path) -> bool:
    """Whether a path is one of the above, by the names that it holds; no image is read."""
    path = pathlib.Path(source)
    return _is_idx(path) or _has_sets(path) or _is_folder(path)


def read_images(
    source: str | pathlib.Path,
    *,
    part: Literal["train", "test"] = "train",
    classes: Sequence[str] = (),
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
) -> Images:
    """The images of a path; part: of two sets the one to learn from, or the one held out.

    classes: names of the labels of IDX files. size, channels: of images in folders
    (`read_folder`); by default they are of one size, and of 3 channels. Raises InputError as
    `read_idx`, `read_folder` and `read_sets` do, and for a path that holds no images.
    """
    path = pathlib.Path(source)
    if _is_idx(path):
        if size is not None or channels not in (None, 1):
            raise InputError(
                f"{path}: IDX files are of one size, and grey: leave size and channels out"
            )
        return read_idx(path, _labels_of(path), classes)
    if _has_sets(path):
        of_idx = find_idx(path, f"train{_IDX}") is not None
        given: Literal[1, 3] = channels or (1 if of_idx else 3)
        return read_sets(path, classes=classes, size=size, channels=given)[part == "test"]
    if not _is_folder(path):
        what = "holds no image" if path.exists() else "no such file or folder"
        raise InputError(
            f"{path}: {what}; give a folder of images ({', '.join(SUFFIXES)}), one with a folder "
            "for each class, or an IDX file"
        )
    if classes:
        raise InputError(f"{path}: its folders are the classes: leave classes out")
    return read_folder(path, size=size, channels=channels or 3)


def read_like(
    source: str | pathlib.Path, space: ImageSpace, *, part: Literal["train", "test"] = "train"
) -> Images:
    """The same, as a model of that space sees them: of its size, and of its classes' names.

    Raises InputError also for images that are of another size, and cannot be scaled to it.
    """
    path = pathlib.Path(source)
    if _is_idx(path) or find_idx(path, f"train{_IDX}"):
        found = read_images(path, part=part, classes=space.about.get("classes", ()))
    else:
        square = space.height if space.height == space.width else None
        found = read_images(path, part=part, size=square, channels=3 if space.channels == 3 else 1)
    if found.pixels.shape[1:] != space.shape:
        own, theirs = (" x ".join(map(str, s)) for s in (found.pixels.shape[1:], space.shape))
        raise InputError(f"{path}: its images are of {own} values, the model's of {theirs}")
    return found


def _is_idx(path: pathlib.Path) -> bool:
    return _IDX in path.name and path.is_file()


def _labels_of(path: pathlib.Path) -> pathlib.Path | None:
    name = path.name.removesuffix(".gz").replace(_IDX, "-labels-idx1-ubyte")
    return find_idx(path.parent, name)


def _has_sets(path: pathlib.Path) -> bool:
    if find_idx(path, f"train{_IDX}") or find_idx(path, f"t10k{_IDX}"):
        return True
    return all((path / part).is_dir() for part in ("train", "test"))


def _is_folder(path: pathlib.Path) -> bool:
    """Whether an image stands in a folder, or in a folder of it."""
    if not path.is_dir():
        return False
    inner = [one for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")]
    return any(one.suffix.lower() in SUFFIXES for at in (path, *inner) for one in at.iterdir())
