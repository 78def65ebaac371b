"""Where a store may be written; imports little, so that a refusal is quick."""

import os
import pathlib

from common_jax.errors import InputError

__all__ = ["DESCRIPTION", "check_target"]

DESCRIPTION = "store.json"  # what a store is known by


def check_target(directory: str | pathlib.Path, *, overwrite: bool = False) -> None:
    """InputError where a store could not be written, before any work is done for it."""
    final = pathlib.Path(directory).absolute()
    if final.exists():
        if not overwrite:
            raise InputError(f"{directory}: exists; name a new directory, or allow overwriting")
        if not (final / DESCRIPTION).is_file():
            raise InputError(f"{directory}: exists and is not a store, so it is not overwritten")
    folder = next(path for path in final.parents if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{directory}: {folder} cannot be written to; name another directory")
