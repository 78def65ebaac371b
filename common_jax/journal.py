"""A journal of finished batches, from which a killed run is resumed.

with Journal(path, settings) as journal:
    journal.begin(fingerprint)
    done = journal.section("scores", key, read)
    for batch in batches_without(done.entries):
        done.append(compute(batch))
    ...  # write the whole result
    journal.remove()

A section holds the batches of one computation; its key stands for all that they depend on beyond
what the journal itself is of. A function that computes batches takes a journal and opens a section
of its own, so that several, one after another, share the file.
"""

import collections
import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Generic, Protocol, TypeVar

import numpy as np

from common_jax import resume
from common_jax.distributed import by_first, is_first
from common_jax.errors import InputError

__all__ = ["Journal", "Section", "Sections", "plain_array"]


class Batch(Protocol):
    """A batch's results: a named tuple of what JSON holds, and of arrays. rows: their numbers."""

    @property
    def rows(self) -> list[int]: ...


E = TypeVar("E", bound=Batch)
Read = Callable[[Any], E | None]


class Section(Generic[E]):
    """The finished batches of one computation.

    entries: those of earlier starts. One made without arguments has none, and keeps none: what a
    computation without a journal takes.
    """

    def __init__(
        self, entries: Iterable[E] = (), write: Callable[[E], None] = lambda entry: None
    ) -> None:
        """write: called with each batch that is appended."""
        self.entries = list(entries)
        self._write = write

    def append(self, entry: E) -> None:
        """Keep a finished batch."""
        self._write(entry)


class Sections(Protocol):
    """What has sections: a journal, or a part of one."""

    def section(self, name: str, key: str, read: Read[E]) -> Section[E]:
        """The batches of a computation; see `Journal.section`."""
        ...

    def part(self, name: str) -> "Sections":
        """Sections of their own, of one thing of several that this is of, such as a model."""
        ...


class Journal:
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
        self.resumed: collections.Counter[str] = collections.Counter()
        self._settings = dict(settings or {})
        self._kept = 0  # bytes of earlier starts
        self._wrote = False
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

    def __enter__(self) -> "Journal":
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

    def begin(self, fingerprint: str) -> None:
        """Go on with an earlier start of this run, or begin the file.

        Raises InputError where the file is of another fingerprint.
        """
        if self._found is None:
            if self._file is not None:
                self._file.truncate(0)
            header = {"fingerprint": fingerprint, "settings": self._settings}
            self._write(json.dumps(header).encode() + b"\n")
            return
        if self._found.get("fingerprint") != fingerprint:
            raise self._another(
                "it has other weights, tokens or precision, or is of another version"
            )
        self._kept = by_first(self._cut)

    def _cut(self) -> int:
        """Remove a last line that was cut short; returns how many bytes are left."""
        assert self._file is not None
        self._file.seek(0)
        whole = sum(len(line) for line in self._file if line.endswith(b"\n"))
        self._file.truncate(whole)
        return whole

    def section(self, name: str, key: str, read: Read[E]) -> Section[E]:
        """The batches of one computation, and where its further ones go; after `begin`.

        name: of what it computes for each row, in words, for a note on stderr of how many are done
        already; `resumed` has their numbers. key: stands for all that they depend on, in each
        process. read: a batch of what JSON gives back; None, or an error as of a wrong type, where
        it is none, and is to be computed again.
        """
        label = f"{name} {key}"
        begun = json.dumps([label])[:-1].encode() + b", "
        lines = (line for line in self._lines() if line.startswith(begun))
        entries = [entry for line in lines if (entry := _entry(line, read)) is not None]
        if rows := {row for entry in entries for row in entry.rows}:
            self.resumed[name] += len(rows)
            if is_first():
                print(f"note: {len(rows)} {name} are done: {self.path}", file=sys.stderr)

        def write(entry: E) -> None:
            self._wrote = True
            self._write(json.dumps([label, entry], default=plain_array).encode() + b"\n")

        return Section(entries, write)

    def part(self, name: str) -> Sections:
        """Its sections for one thing of several, such as a model; name: stands for it alone."""
        return _Part(self, name)

    def _lines(self) -> Iterator[bytes]:
        """What earlier starts have appended."""
        if not self._kept:
            return
        left = self._kept - self._header
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._header)
            while left > 0 and (line := file.readline(left)):
                left -= len(line)
                yield line
        if left:
            raise InputError(
                f"{self.path}: is shorter here than for process 0: the file system shows it late; "
                "start again once it shows all processes the same"
            )

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

    def close(self) -> None:
        """Close the file, and leave it for the next run if it holds any batch."""
        if self._file is None:
            return
        if not self._file.closed and self._found is None and not self._wrote:
            self.path.unlink(missing_ok=True)
        # What could not be written before cannot be written now, and has been told.
        with contextlib.suppress(OSError):
            self._file.close()

    def remove(self) -> None:
        """Delete the file, after a complete run."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()


class _Part:
    """Sections of a journal whose keys begin with a name."""

    def __init__(self, whole: Sections, name: str) -> None:
        self._whole, self._name = whole, name

    def section(self, name: str, key: str, read: Read[E]) -> Section[E]:
        return self._whole.section(name, f"{self._name} {key}", read)

    def part(self, name: str) -> Sections:
        return _Part(self, name)


_START = b'{"fingerprint": "'
_LONGEST_HEADER = 1 << 16


def _entry(line: bytes, read: Read[E]) -> E | None:
    """The entry of a section's line; None where it is none."""
    try:
        _, record = json.loads(line)
        return read(record)
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
