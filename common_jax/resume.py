"""Resuming work that was killed: alone in its folder, and with the settings it began with.

    with resume.hold(folder, settings, free={"mesh"}):
        ...  # all checkpoints, journals and results in the folder are of these settings

Settings are a mapping that JSON can hold, of all that the result depends on. A checksum stands for
what is too long to name (weights, rows of data). They are stored in the folder's settings.json.
"""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO

from common_jax.agreement import agree, flat, plain
from common_jax.distributed import by_first
from common_jax.errors import InputError, Taken
from common_jax.io.files import make_folder, parse_json, write_json

__all__ = [
    "alone",
    "check",
    "check_alone",
    "difference",
    "hold",
    "lock",
    "open_alone",
    "settle",
]

SETTINGS = "settings.json"
LOCK = ".lock"

Settings = Mapping[str, Any]


@contextlib.contextmanager
def hold(
    folder: str | pathlib.Path, settings: Settings, *, free: Collection[str] = ()
) -> Iterator[None]:
    """Hold `folder`, made if it is not there, for this run `alone`, and `settle` its settings."""
    with alone(folder):
        settle(folder, settings, free=free)
        yield


def settle(folder: str | pathlib.Path, settings: Settings, *, free: Collection[str] = ()) -> None:
    """`check`, and store the settings in `folder`, which exists, for later starts to check.

    Names that the run there lacks are added to its settings: from here on they are its own.
    """
    check(folder, settings, free=free)
    path = pathlib.Path(folder) / SETTINGS
    given = plain({k: v for k, v in settings.items() if k not in free})
    found = by_first(lambda: parse_json(path.read_bytes()) if path.exists() else None)
    if (grown := _grown(found or {}, given)) != found:
        write_json(path, grown)


def check(folder: str | pathlib.Path, settings: Settings, *, free: Collection[str] = ()) -> None:
    """Raise InputError where the work in `folder` began with other settings; writes nothing.

    settings: all of them must be the same in a resumed run, except the names in `free`, and in
    every process of it.
    """
    agree({k: v for k, v in settings.items() if k not in free})
    by_first(lambda: _check(folder, settings, free))


def _check(folder: str | pathlib.Path, settings: Settings, free: Collection[str]) -> None:
    path = pathlib.Path(folder) / SETTINGS
    if not path.exists():
        return
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        found, cause = None, error
    else:
        cause = None
    if not isinstance(found, dict):
        raise InputError(
            f"{path}: cannot be read, or is damaged; put the run's settings back, or name a new "
            "directory"
        ) from cause
    if differs := difference(found, settings, free=free):
        raise InputError(
            f"{folder}: the run there has {differs}; give the same settings, or name a new "
            "directory"
        )


def difference(found: Settings, wanted: Settings, *, free: Collection[str] = ()) -> str | None:
    """The first setting that differs, as in "steps 20, not 30"; None where none does.

    found: as stored. wanted: of this start. Nested settings are named with dots, training.steps. A
    name that `found` lacks is an option newer than that run: no difference. A name that only
    `found` has, in a group that is given, is an option that was removed: a difference. What a name
    says in brackets explains it, in words that may change: "rows (their checksum)" is "rows".
    """
    before = flat({k: v for k, v in plain(found).items() if k not in free})
    now = flat({k: v for k, v in plain(wanted).items() if k not in free})
    stored = {_bare(name): value for name, value in before.items()}
    for name, value in now.items():
        if (old := stored.get(_bare(name), value)) != value:
            return f"{name} {old!r}, not {value!r}"
    for name in before.keys() - now.keys():
        group, dot, _ = name.partition(".")
        if dot and isinstance(wanted.get(group), Mapping):
            return f"{name} {before[name]!r}, which is not given now"
    return None


@contextlib.contextmanager
def alone(folder: str | pathlib.Path) -> Iterator[None]:
    """Hold `folder`, made if it is not there; raises InputError while another process does."""
    with lock(make_folder(folder) / LOCK, _taken(folder)):
        yield


def check_alone(folder: str | pathlib.Path) -> None:
    """Raise InputError while another process holds `folder`, long before `alone` would."""
    path = pathlib.Path(folder) / LOCK

    def look() -> None:
        if path.exists():  # left by a run that was killed, or held
            with lock(path, _taken(folder)):
                pass

    by_first(look)


def _taken(folder: str | pathlib.Path) -> str:
    return f"{folder}: another run is writing there; name another directory"


@contextlib.contextmanager
def lock(path: pathlib.Path, taken: str) -> Iterator[None]:
    """Hold the lock file `path`; raises InputError with the text `taken` where it is held.

    Of several processes of one run, process 0 holds it for all.
    """
    held: list[BinaryIO] = []
    by_first(lambda: held.append(open_alone(path, taken)))
    try:
        yield
    finally:
        for file in held:
            path.unlink(missing_ok=True)  # while it is held
            file.close()


def open_alone(path: pathlib.Path, taken: str) -> BinaryIO:
    """`path`, open for this process alone to read and append; InputError `taken` where it is held.

    The kernel releases it when it is closed or the process ends, in whatever way. Remove the file
    before that, not after.
    """
    while True:
        try:
            file = path.open("a+b")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise Taken(taken) from error
        if _is(path, file.fileno()):
            return file
        file.close()  # its holder removed it meanwhile: there may be a new file of that name


def _is(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _grown(found: Settings, given: Settings) -> dict[str, Any]:
    """Stored settings, and the names that they lack; what stands there stays."""
    stored, grown = {_bare(name): name for name in found}, dict(found)
    for name, value in given.items():
        old = grown.setdefault(stored.get(_bare(name), name), value)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            grown[stored.get(_bare(name), name)] = _grown(old, value)
    return grown


def _bare(name: str) -> str:
    return name.partition(" (")[0]
