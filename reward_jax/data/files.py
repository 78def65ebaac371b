"""Recorded episodes from a file or a dataset, whatever its format."""

import pathlib

from common_jax.errors import InputError
from reward_jax.data import hdf5, minari
from reward_jax.data.episodes import Episodes

__all__ = ["read_episodes"]

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
