"""Tables of results, and a journal from which a killed run is resumed.

Legend: N rows of a table, K values of a cell, L layers, b prompts of a batch, B its rows, C
prompts of a row.
"""

import csv
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from common_jax import resume
from common_jax.errors import InputError
from common_jax.io.files import atomic
from tuco_jax.prompts.packing import Packed

Columns = Mapping[str, Sequence[Any] | Shaped[np.ndarray, "N ..."]]  # by name

__all__ = [
    "FORMATS",
    "Columns",
    "Entry",
    "Journal",
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

    Its first line is a fingerprint of prompts, pair and options: a journal of any other run is
    started anew. A last line cut short by the kill is removed. The file is locked while it is
    open, so that two runs do not share it; the lock ends with its process.
    """

    def __init__(self, path: pathlib.Path, fingerprint: str):
        self.path = path
        self.entries: list[Entry] = []
        self._file = resume.open_alone(path, _taken(path))
        self._file.seek(0)
        start = self._file.read(16)
        if start and not b'{"fingerprint": "'.startswith(start[:16]):
            self._file.close()
            raise InputError(f"{path}: is not a journal of ours; move it, or name another output")
        self._file.seek(0)
        header = json.dumps({"fingerprint": fingerprint}).encode() + b"\n"
        keep = len(header)
        if self._file.readline() == header:
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                try:
                    rows, *arrays = json.loads(line)
                    entry = Entry(rows, *(np.asarray(a, np.float32) for a in arrays))
                except (ValueError, TypeError):
                    break  # damaged: the rest is computed again
                self.entries.append(entry)
                keep += len(line)
            self._file.truncate(keep)
        else:
            self._file.truncate(0)
            self._write(header)

    @staticmethod
    def check(path: pathlib.Path) -> None:
        """Raise InputError while another run is writing there, before any weights are read."""
        resume.check_free(path, _taken(path))

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
            self._file.flush()  # to the kernel: outlives the process, not the machine
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from error

    def append(self, entry: Entry) -> None:
        """Add a finished batch."""
        self.entries.append(entry)
        record = [entry.rows, *(_plain(array) for array in entry[1:])]
        self._write(json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        """Close the file, and leave it for the next run if it holds any batch."""
        if not self.entries:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def remove(self) -> None:
        """Delete the file, after a complete run."""
        self.path.unlink(missing_ok=True)
        self._file.close()


def _taken(path: pathlib.Path) -> str:
    return f"{path}: another run is writing this output"
