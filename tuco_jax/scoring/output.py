"""Tables of results, what made them, and a batch's scores as a journal holds them.

Legend: N rows of a table, K values of a cell, L layers, b prompts of a batch, B its rows, C
prompts of a row.
"""

import contextlib
import csv
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from common_jax import resume
from common_jax.agreement import agree
from common_jax.distributed import by_first
from common_jax.errors import InputError
from common_jax.io.files import atomic
from common_jax.journal import plain_array
from tuco_jax.prompts.packing import Packed
from tuco_jax.prompts.read import Prompt

Columns = Mapping[str, Sequence[Any] | Shaped[np.ndarray, "N ..."]]  # by name

__all__ = [
    "FORMATS",
    "Columns",
    "Entry",
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
    atomic(path, lambda temporary: write[path.suffix](temporary, columns))


def _rows(columns: Columns) -> Iterator[list[Any]]:
    for row in zip(*columns.values(), strict=True):
        yield [plain_array(value) for value in row]


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

    @classmethod
    def read(cls, record: Any, shape: tuple[int, int]) -> "Entry | None":
        """The entry that a journal holds; None, or an error, where it is none. shape: N and L."""
        rows, *arrays = record
        entry = cls(rows, *(np.asarray(a, np.float32) for a in arrays))
        count, depth = shape
        good = all(type(row) is int and 0 <= row < count for row in rows)
        shapes = entry.tuco.shape, entry.layers.shape, entry.telescoping.shape
        good &= shapes == ((len(rows),), (len(rows), depth), (len(rows),))
        return entry if good and all(np.isfinite(a).all() for a in entry[1:]) else None


def check_made(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError where `path` holds what other settings, or nothing known, has made.

    Settings stand in the metadata beside it. A file that is empty holds nothing. Of several
    processes all were given the same settings, or it is raised in all.
    """
    agree(settings)
    by_first(lambda: _check_made(path, settings))


def _check_made(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
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
            differs = "other weights, tokens or precision, or is of another version"
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
