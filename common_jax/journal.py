"""A journal of finished batches, from which a killed run is resumed.

with Journal(path, settings) as journal:
    journal.begin(fingerprint, read)
    for batch in batches_without(journal.entries):
        journal.append(compute(batch))
    ...  # write the whole result
    journal.remove()
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np

from common_jax import resume
from common_jax.distributed import by_first
from common_jax.errors import InputError

__all__ = ["Journal", "plain_array"]

E = TypeVar("E")  # a batch's results: a tuple of what JSON holds, and of arrays


class Journal(Generic[E]):
    """An append-only file of finished batches, a line each.

    Its first line holds the run's settings and a fingerprint of all else that the results depend
    on: what another run has left is refused, never overwritten. A last line cut short by the kill
    is removed. The file is locked while it is open, so that two runs do not share it; the lock
    ends with its process. Use as a context, or close it. Of several processes, process 0 writes
    it.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any] | None = None):
        """Hold the file. settings: those that results depend on, for messages."""
        self.path = path
        self.entries: list[E] = []
        self._settings = dict(settings or {})
        self._file: BinaryIO | None = None  # process 0's alone
        self._found, self._header = by_first(self._open)

    def _open(self) -> tuple[dict[str, Any] | None, int]:
        """Hold the file; returns what its first line holds, and that line's length."""
        file = resume.open_alone(self.path, f"{self.path}: another run is writing this output")
        try:
            found, length = self._read_header(file)
            if found:
                differs = resume.difference(found.get("settings", {}), self._settings)
                if differs:
                    raise self._another(f"it has {differs}")
        except BaseException:
            file.close()
            raise
        self._file = file
        return found, length

    def __enter__(self) -> "Journal[E]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _another(self, why: str) -> InputError:
        return InputError(
            f"{self.path}: holds the work of another run, which has not ended: {why}; start that "
            "run again to end it, or name another output"
        )

    def _read_header(self, file: BinaryIO) -> tuple[dict[str, Any] | None, int]:
        """What the first line holds, and its length; None where no batch follows it."""
        file.seek(0)
        start = file.read(len(_START))
        if start and not _START.startswith(start):
            raise InputError(f"{self.path}: is not a journal of ours; name another output")
        file.seek(0)
        line, more = file.readline(_LONGEST_HEADER), file.read(1)
        if not more:
            return None, 0
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("settings", {}), dict):
            raise InputError(f"{self.path}: is damaged; name another output")
        return found, len(line)

    def begin(self, fingerprint: str, read: Callable[[Any], E | None]) -> None:
        """Take the entries of an earlier start of this run, or begin the file.

        read: an entry of what JSON gives back; None, or an error as of a wrong type, where it is
        none. Raises InputError for another run's entries.
        """
        if self._found is None:
            if self._file is not None:
                self._file.truncate(0)
            header = {"fingerprint": fingerprint, "settings": self._settings}
            self._write(json.dumps(header).encode() + b"\n")
            return
        if self._found.get("fingerprint") != fingerprint:
            raise self._another("it has other weights or tokens, or is of another version")
        count, keep = by_first(lambda: self._take(read))
        if self._file is not None:
            self._file.truncate(keep)
        elif self._take(read, keep) != [count, keep]:
            raise InputError(
                f"{self.path}: {len(self.entries)} of {count} batches in it are seen here: the "
                "file system shows it late; start again once it shows all processes the same"
            )

    def _take(self, read: Callable[[Any], E | None], end: int | None = None) -> list[int]:
        """Take the entries up to `end`; returns how many there are, and where the last ends."""
        keep = self._header
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(keep)
            for line in file:
                if end is not None and keep + len(line) > end:
                    break
                entry = _entry(line, read)
                if entry is None:  # cut short, or damaged: the rest is computed again
                    break
                self.entries.append(entry)
                keep += len(line)
        return [len(self.entries), keep]

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.write(data)
            self._file.flush()  # to the kernel: outlives the process, not the machine
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written: {error.strerror}; what it holds is kept: make "
                "room, and start again to go on"
            ) from error

    def append(self, entry: E) -> None:
        """Add a finished batch."""
        self.entries.append(entry)
        self._write(json.dumps(entry, default=plain_array).encode() + b"\n")

    def close(self) -> None:
        """Close the file, and leave it for the next run if it holds any batch."""
        if self._file is None:
            return
        if not self._file.closed and self._found is None and not self.entries:
            self.path.unlink(missing_ok=True)
        # What could not be written before cannot be written now, and has been told.
        with contextlib.suppress(OSError):
            self._file.close()

    def remove(self) -> None:
        """Delete the file, after a complete run."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()


_START = b'{"fingerprint": "'
_LONGEST_HEADER = 1 << 16


def _entry(line: bytes, read: Callable[[Any], E | None]) -> E | None:
    """The entry of a line; None where it is none."""
    try:
        return read(json.loads(line)) if line.endswith(b"\n") else None
    except (ValueError, TypeError, IndexError, OverflowError, RecursionError):
        return None


def plain_array(value: Any) -> Any:
    """An array, or a number of one, as Python's own types.

    float32 has the fewest digits that read back as the same number.
    """
    if isinstance(value, np.ndarray):
        return [plain_array(v) for v in value]
    if isinstance(value, np.generic):
        return float(str(value)) if value.dtype == np.float32 else value.item()
    return value
