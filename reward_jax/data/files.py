"""Recorded episodes, from and to a file or a dataset, whatever its format."""

import pathlib
from collections.abc import Mapping
from typing import Any

from common_jax.errors import InputError
from common_jax.io.files import check_writable
from reward_jax.data import hdf5, minari
from reward_jax.data.episodes import Episodes

__all__ = ["check_output", "read_episodes", "write_episodes"]

SUFFIXES = (".hdf5", ".h5")
SCHEME = "minari:"


def read_episodes(source: str | pathlib.Path, *, ends: str = "auto") -> Episodes:
    """Episodes of an HDF5 file in D4RL's layout (.hdf5, .h5), or of a Minari dataset.

    The latter is a folder, or an id after `minari:`, as in minari:NAMESPACE/NAME-v0. ends: where
    episodes of an HDF5 file end (see `hdf5.read`); Minari's are known. Raises InputError, one line
    that names the source, for data that are missing, damaged, empty, of shapes that do not match,
    or not finite.
    """
    text = str(source)
    if text.startswith(SCHEME):
        return minari.read(text.removeprefix(SCHEME))
    path = pathlib.Path(source)
    if path.is_dir():
        return minari.read(path)
    if path.suffix.lower() in SUFFIXES:
        return hdf5.read(path, ends=ends)
    what = "is of no known kind" if path.exists() else "no such file"
    raise InputError(
        f"{text}: {what}; give a {' or '.join(SUFFIXES)} file in D4RL's layout, a Minari "
        f"dataset's folder, or an id as in {SCHEME}NAMESPACE/NAME-v0"
    )


def check_output(out: str | pathlib.Path) -> None:
    """Raise InputError for a place that `write_episodes` could not write to. Leaves nothing."""
    folder = _folder(out)
    if folder is None:
        check_writable(out, SUFFIXES)
    elif folder.exists():
        raise InputError(f"{out}: exists; name another folder or id for a Minari dataset")


def write_episodes(
    out: str | pathlib.Path, episodes: Episodes, *, run: Mapping[str, Any] | None = None
) -> pathlib.Path:
    """Write an HDF5 file in D4RL's layout (.hdf5, .h5), else a Minari dataset, and say where.

    The latter is a folder, or an id after `minari:`. run: what made the episodes, plain JSON.
    """
    folder = _folder(out)
    if folder is None:
        hdf5.write(out, episodes, run=run)
        return pathlib.Path(out)
    text = str(out)
    identifier = text.removeprefix(SCHEME) if text.startswith(SCHEME) else None
    minari.write(folder, episodes, identifier=identifier, run=run)
    return folder


def _folder(out: str | pathlib.Path) -> pathlib.Path | None:
    """The folder of a Minari dataset; None for a file."""
    if str(out).startswith(SCHEME):
        return minari.folder_of(str(out).removeprefix(SCHEME))
    path = pathlib.Path(out)
    return None if path.suffix else path
