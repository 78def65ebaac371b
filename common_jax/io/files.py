"""Files of results: checked before the work begins, written whole or not at all, read back."""

import contextlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from typing import Any

from common_jax.distributed import by_first
from common_jax.errors import InputError

__all__ = [
    "atomic",
    "cannot_write",
    "check_writable",
    "is_full",
    "make_folder",
    "parse_json",
    "read_arrays",
    "read_json",
    "why_not_written",
    "write_arrays",
    "write_json",
    "write_text",
    "writing",
]

_DEEPEST = 100  # lists within lists of a document; Python's own limit ends in a RecursionError


def check_writable(path: str | pathlib.Path, formats: Collection[str]) -> pathlib.Path:
    """The path of an output; raises InputError where it could not be written. Leaves no file."""
    path = pathlib.Path(path)
    if path.suffix not in formats:
        raise InputError(f"{path}: output comes as {', '.join(formats)}, not {path.suffix!r}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{path}: the folder {folder} does not exist; make it first")
    try:
        # Permission bits do not show read-only mounts, nor bind root: try.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{path}: cannot write into {folder}: {error.strerror}") from error
    return path


def make_folder(path: str | pathlib.Path) -> pathlib.Path:
    """The folder, made if it is not there; raises InputError where it cannot be written to."""
    path = pathlib.Path(path)

    def make() -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise InputError(
                f"{path}: no folder that can be written to ({error.strerror}); name another"
            ) from error

    by_first(make)
    return path


_FULL = re.compile(r"no space left on device|quota exceeded|file too large", re.IGNORECASE)


def is_full(error: Exception) -> bool:
    """Whether an error is that of a full disk, or of a user's full share of it.

    Libraries raise such errors in kinds of their own (orbax, safetensors, tokenizers), which quote
    the system's.
    """
    return _FULL.search(str(error)) is not None


def why_not_written(error: Exception) -> str:
    """Why something cannot be written, in one line, and how to mend it where a disk is full."""
    text = " ".join(str(error).split())
    if full := _FULL.search(text):
        return f"{full[0].lower().capitalize()}; make room, or name another place"
    return (isinstance(error, OSError) and error.strerror) or text[:200] or type(error).__name__


def cannot_write(path: pathlib.Path, error: Exception) -> InputError:
    """The error of a file that cannot be written, in one line that says why."""
    return InputError(f"{path}: cannot be written: {why_not_written(error)}")


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Raise InputError that names `path` where what is done in the block cannot be written."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or is_full(error):
            raise cannot_write(path, error) from error
        raise


def atomic(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Call `write` with a temporary path beside `path`, which is moved onto it afterwards.

    After an error `path` is as it was; where it cannot be written, InputError names it. Of several
    processes, process 0 alone calls it, while the others wait: it may compute nothing with them.
    """

    def act() -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with writing(path):
                write(temporary)
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    by_first(act)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text, as UTF-8."""
    atomic(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_arrays(path: pathlib.Path, **arrays: Any) -> None:
    """Write arrays by name as one compressed .npz file."""
    import numpy as np

    def write(temporary: pathlib.Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    atomic(path, write)


def read_arrays(
    path: pathlib.Path,
    names: Collection[str] = (),
    mend: str = "delete it, and it is made again",
) -> dict[str, Any]:
    """The arrays of an .npz file by name.

    Raises InputError where it is missing, damaged or lacks one of the names. mend: the end of the
    message, which says what to do.
    """
    import zipfile
    import zlib

    import numpy as np

    damaged = KeyError, EOFError, RuntimeError, TypeError, ValueError, OSError
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in dict.fromkeys([*names, *stored])}
    except (*damaged, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: is missing or damaged; {mend}") from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write one JSON document."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """One JSON document; raises ValueError for anything else, also for one nested too deeply."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [found], 0
    while level:
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        groups = [x for x in level if isinstance(x, dict | list)]
        level = [y for x in groups for y in (x.values() if isinstance(x, dict) else x)]
        depth += 1
    return found


def read_json(
    path: pathlib.Path, wanted: Any, mend: str = "delete it, and it is made again"
) -> Any:
    """One JSON document; raises InputError where it is cut short or lacks something.

    wanted: what it must hold: {key: what it holds}, [what each item holds], or None for anything.
    mend: the end of the message, which says what to do.
    """
    try:
        found = parse_json(path.read_bytes())
    except OSError as error:  # it may be good: nothing says to delete it
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); make it readable, or name another folder"
        ) from error
    except ValueError:  # not UTF-8, or no JSON
        raise InputError(f"{path}: is damaged or cut short; {mend}") from None
    if lack := _lack(found, wanted, ""):
        raise InputError(f"{path}: is damaged, it has no {lack}; {mend}")
    return found


def _lack(found: Any, wanted: Any, name: str) -> str:
    """Name of the first thing that is missing, or ""."""
    if wanted is None:
        return ""
    if not isinstance(found, type(wanted)):
        return f"{'list' if isinstance(wanted, list) else 'mapping'} {name}".strip()
    if isinstance(wanted, list):
        parts = [(value, wanted[0], f"{name}[{i}]") for i, value in enumerate(found)]
    else:
        dot = f"{name}." if name else ""
        missing = [key for key in wanted if key not in found]
        if missing:
            return dot + missing[0]
        parts = [(found[key], inner, dot + key) for key, inner in wanted.items()]
    return next((lack for part in parts if (lack := _lack(*part))), "")
