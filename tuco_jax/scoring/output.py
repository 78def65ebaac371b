"""Tables of results, and a journal from which a killed run is resumed.

Legend: N rows of a table, K values of a cell, L layers, b prompts of a batch, B its rows, C
prompts of a row.
"""

import contextlib
import csv
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from common_jax import resume
from common_jax.agreement import agree
from common_jax.distributed import by_first, meet
from common_jax.errors import InputError
from common_jax.io.files import atomic
from tuco_jax.prompts.packing import Packed
from tuco_jax.prompts.read import Prompt

Columns = Mapping[str, Sequence[Any] | Shaped[np.ndarray, "N ..."]]  # by name

__all__ = [
    "FORMATS",
    "Columns",
    "Entry",
    "Journal",
    "check_made",
    "held",
    "meta_path",
    "prompts_checksum",
    "write_table",
]

FORMATS = (".jsonl", ".csv", ".parquet")


def write_table(path: pathlib.Path, columns: Columns) -> None:
    """Write equally long columns as .jsonl, .csv or .parquet, by the path's ending.

    A column is a list, or an array [N] or [N, K]; in a .csv, rows of the latter are JSON lists.
    float32 is written with the fewest digits that read back as the same number.
    """
    write = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
    with atomic(path) as temporary:
        write[path.suffix](temporary, columns)


def _plain(value: Any) -> Any:
    """A value as Python's own types."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return float(str(value)) if value.dtype == np.float32 else value.item()
    return value


def _rows(columns: Columns) -> Iterator[list[Any]]:
    for row in zip(*columns.values(), strict=True):
        yield [_plain(value) for value in row]


def _write_jsonl(path: pathlib.Path, columns: Columns) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in _rows(columns):
            record = dict(zip(columns, row, strict=True))
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_csv(path: pathlib.Path, columns: Columns) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in _rows(columns):
            writer.writerow(json.dumps(v) if isinstance(v, list | bool) else v for v in row)


def _write_parquet(path: pathlib.Path, columns: Columns) -> None:
    import pyarrow
    import pyarrow.parquet

    def column(values: Sequence[Any] | np.ndarray) -> pyarrow.Array:
        if isinstance(values, np.ndarray) and values.ndim == 2:
            return pyarrow.array(
                list(values), pyarrow.list_(pyarrow.from_numpy_dtype(values.dtype))
            )
        if len({type(v) for v in values} - {type(None)}) > 1:  # such as ids 1, 2, "three"
            numbers = not any(isinstance(v, str) for v in values)
            values = [v if v is None else float(v) if numbers else str(v) for v in values]
        return pyarrow.array(values)

    table = pyarrow.table({name: column(values) for name, values in columns.items()})
    pyarrow.parquet.write_table(table, path)


class Entry(NamedTuple):
    """One batch's results for prompts `rows`; see `Scores`."""

    rows: list[int]
    tuco: Float[np.ndarray, " b"]
    layers: Float[np.ndarray, "b L"]
    telescoping: Float[np.ndarray, " b"]

    @classmethod
    def of(cls, batch: Packed, *values: Any) -> "Entry":
        """The entry of a batch's tuco [B, C], layers [B, C, L] and telescoping [B, C]."""
        return cls(batch.prompts, *(batch.unpack(np.asarray(value)) for value in values))


class Journal:
    """An append-only file of finished batches, from which a killed run is resumed.

    Its first line holds the run's settings and a fingerprint of prompts, pair and options: what
    another run has left is refused, never overwritten. A last line cut short by the kill is
    removed. The file is locked while it is open, so that two runs do not share it; the lock ends
    with its process. Use as a context, or close it. Of several processes, process 0 writes it.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any] | None = None):
        """Hold the file. settings: all but weights that scores depend on, for messages."""
        self.path = path
        self.entries: list[Entry] = []
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

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _another(self, why: str) -> InputError:
        return InputError(
            f"{self.path}: holds the scores of another run, which has not ended: {why}; start "
            "that run again to end it, or name another output"
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

    def begin(self, fingerprint: str, shape: tuple[int, int] | None = None) -> None:
        """Take the entries of an earlier start of this run, or begin the file.

        shape: N and L, which entries must fit. Raises InputError for another run's entries.
        """
        if self._found is None:
            if self._file is not None:
                self._file.truncate(0)
            header = {"fingerprint": fingerprint, "settings": self._settings}
            self._write(json.dumps(header).encode() + b"\n")
            return
        if self._found.get("fingerprint") != fingerprint:
            raise self._another("it has other weights or tokens, or is of another version")
        keep = self._header
        with self.path.open("rb") as file:
            file.seek(keep)
            for line in file:
                entry = _entry(line, shape)
                if entry is None:  # cut short, or damaged: the rest is computed again
                    break
                self.entries.append(entry)
                keep += len(line)
        meet()  # all have read it
        if self._file is not None:
            self._file.truncate(keep)

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

    def append(self, entry: Entry) -> None:
        """Add a finished batch."""
        self.entries.append(entry)
        record = [entry.rows, *(_plain(array) for array in entry[1:])]
        self._write(json.dumps(record).encode() + b"\n")

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


def _entry(line: bytes, shape: tuple[int, int] | None) -> Entry | None:
    """The entry of a line; None where it is none."""
    try:
        found: Any = json.loads(line) if line.endswith(b"\n") else None
        rows, *arrays = found
        entry = Entry(rows, *(np.asarray(a, np.float32) for a in arrays))
        count, depth = shape or (max(rows) + 1, entry.layers.shape[1])
        good = all(type(row) is int and 0 <= row < count for row in rows)
        shapes = entry.tuco.shape, entry.layers.shape, entry.telescoping.shape
        good &= shapes == ((len(rows),), (len(rows), depth), (len(rows),))
        return entry if good and all(np.isfinite(a).all() for a in entry[1:]) else None
    except (ValueError, TypeError, IndexError, OverflowError, RecursionError):
        return None


def check_made(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError where `path` holds what other settings, or nothing known, has made.

    Settings stand in the metadata beside it. A file that is empty holds nothing. Of several
    processes all were given the same settings, or it is raised in all.
    """
    agree(settings)
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    beside = meta_path(path)
    try:
        differs = resume.difference(json.loads(beside.read_text("utf-8"))["settings"], settings)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(
            f"{path}: is there, and {beside.name}, which would say what made it, is not, or is "
            "damaged; move the file, or name another output"
        ) from None
    if differs:
        if differs.startswith(("fingerprint ", "weights ")):
            differs = "other weights or tokens, or is of another version"
        raise InputError(
            f"{path}: holds the results of another run: it has {differs}; give the same prompts, "
            "models and options, or name another output"
        )


@contextlib.contextmanager
def held(paths: Sequence[pathlib.Path], settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold outputs for this run alone, each of which `check_made` finds to be of it, or free."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            taken = f"{path}: another run is writing this output"
            stack.enter_context(resume.lock(path.with_name(f".{path.name}.lock"), taken))
            check_made(path, settings)
        yield


def meta_path(path: pathlib.Path) -> pathlib.Path:
    """Where the metadata of an output stand. They are written first: what is there has them."""
    return path.with_name(path.name + ".meta.json")


def prompts_checksum(prompts: Sequence[Prompt]) -> str:
    """Of prompts: their texts, conversations, ids and labels."""
    found = hashlib.sha256()
    for p in prompts:
        row = [p.id, p.prompt, p.messages, p.label, p.tools]
        found.update(json.dumps(row, default=str).encode() + b"\n")
    return found.hexdigest()[:16]
