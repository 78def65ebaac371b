"""Prompts: read from a file and checked row by row.

Nothing heavy is imported here, so that a bad file is reported before any model is loaded. Every
error is one line that names the file and line, or the prompt's id.
"""

import contextlib
import csv
import dataclasses
import json
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from common_jax.errors import InputError
from tuco_jax.prompts.messages import (
    Message,
    Tool,
    check_encodes,
    check_text,
    messages_of,
    tools_of,
)

__all__ = ["FORMATS", "Prompt", "as_prompts", "read_prompts"]

FORMATS = (".jsonl", ".csv", ".parquet", ".txt")
_COLUMNS, _LAYOUTS = ("prompt", "messages"), ("goal", "text", "chosen")
_OTHERS = ("id", "label", "target", "tools")
# So that a small file cannot take all memory, nor a broken one hours.
_MOST_BYTES, _LONGEST_LINE, _MOST_ROWS = 1 << 29, 1 << 26, 1_000_000
_ROWS_AT_ONCE = 64

Label = str | float | int | bool | None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row: a text or a conversation, never both.

    id: its name in the output, unique in a file (by default its line or row, from 1). label:
    passed through to the output. line: where it stood in its file, 0 if it came from elsewhere.
    target: how an attack wants the answer to begin, where a data set says so (AdvBench). tools:
    functions that a conversation's model may call, as JSON schemas for the chat template.
    """

    id: str | int
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    label: Label = None
    line: int = 0
    target: str | None = None
    tools: tuple[Tool, ...] | None = None

    def __str__(self) -> str:
        return f"prompt {self.id!r}" + (f" (line {self.line})" if self.line else "")


def read_prompts(path: str | pathlib.Path, *, layouts: bool = False) -> list[Prompt]:
    """Every row of a .jsonl, .csv, .parquet or .txt file (one prompt a line), in order.

    Rows have `prompt` (text) or `messages` (a list of {"role", "content"}; JSON text in a .csv),
    and may have `id` and `label`, with messages also `tools`; other columns are ignored. layouts:
    rows may be those of public data sets, too: `goal` (AdvBench, with its `target`), `text`
    (OpenWebText and others), or `chosen` (HH-RLHF: the conversation up to the answer). Raises
    InputError naming file and line (for .parquet: row) for whatever is wrong, duplicate ids
    included.
    """
    path = pathlib.Path(path)
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: prompts come as {', '.join(FORMATS)}, not {path.suffix!r}")
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"{path}: the prompts file {what}; give one of {', '.join(FORMATS)}")
    try:
        rows = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}[path.suffix]
        columns = _COLUMNS + (_LAYOUTS if layouts else ())
        if path.stat().st_size > _MOST_BYTES:
            raise _too_much(path, f"more than {_MOST_BYTES >> 20} MiB")
        prompts: list[Prompt] = []
        for line, row in rows(path, columns):
            prompts.append(_prompt(_plain(row) if layouts else row, line, f"{path}:{line}"))
            if len(prompts) > _MOST_ROWS:
                raise _too_much(path, f"more than {_MOST_ROWS} rows")
    except OSError as error:
        reason = " ".join((error.strerror or str(error)).split())  # pyarrow's has lines
        raise InputError(f"{path}: cannot be read: {reason}") from error
    if not prompts:
        raise InputError(f"{path}: holds no prompts")
    _check_unique(prompts, path)
    _check_labels(prompts, path)
    return prompts


def _too_much(path: pathlib.Path, what: str) -> InputError:
    return InputError(f"{path}: holds {what}; split it into several files")


def as_prompts(prompts: Iterable[str | Sequence[Message] | Prompt]) -> list[Prompt]:
    """Texts, conversations or Prompts as Prompts; the first two are numbered from 0."""
    if isinstance(prompts, str | bytes):
        raise InputError("give a list of prompts, not one text")
    if isinstance(prompts, Mapping | Prompt) or not isinstance(prompts, Iterable):
        raise InputError(f"give a list of prompts, not one {type(prompts).__name__}")
    found = []
    for index, item in enumerate(prompts):
        if not isinstance(item, Prompt):
            if isinstance(item, Mapping):
                what = "message" if "role" in item else "row"
                raise InputError(
                    f"prompts[{index}] is a {what}: give a list of conversations, each a list of "
                    'messages, as in [[{"role": "user", "content": ...}]]'
                )
            key = "prompt" if isinstance(item, str) else "messages"
            item = _prompt({"id": index, key: item}, 0, f"prompts[{index}]")
        found.append(item)
    if not found:
        raise InputError("the list of prompts is empty")
    return found


def _either(names: Sequence[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}"


def _text(path: pathlib.Path) -> str:
    """The file as text, without a byte-order mark."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}:{line}: byte {error.start} of the file is not UTF-8; save the file as UTF-8"
        ) from error
    return text.removeprefix("\ufeff")


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Lines and their numbers; blank ones at the end are left out."""
    # Not splitlines(): a prompt may hold other separators, such as U+2028.
    text = _text(path).rstrip("\r\n")
    start, line = 0, 0
    while start <= len(text) and text:
        line += 1
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        if end - start > _LONGEST_LINE:
            raise InputError(
                f"{path}:{line}: the line has {end - start} characters; a prompt has "
                f"{_LONGEST_LINE} at most"
            )
        yield line, text[start:end].removesuffix("\r")
        start = end + 1


def _plain(row: Any) -> Any:
    """A row of a public data set as one with `prompt` or `messages`."""
    if not isinstance(row, Mapping) or any(row.get(c) is not None for c in _COLUMNS):
        return row
    found = next((c for c in _LAYOUTS if row.get(c) is not None), None)
    if found is None:
        return row
    if found != "chosen" or not isinstance(row[found], str):
        return {**row, "prompt": row[found]}
    _, *parts = re.split(r"(?:\A|\n\n)(Human|Assistant): ?", row[found])
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": text.strip()}
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    return {**row, "messages": turns[:-1] if turns and len(turns) % 2 == 0 else turns}


def _txt(path: pathlib.Path, _: Sequence[str]) -> Iterator[tuple[int, Any]]:
    for line, text in _lines(path):
        yield line, {"prompt": text}


def _jsonl(path: pathlib.Path, _: Sequence[str]) -> Iterator[tuple[int, Any]]:
    for line, text in _lines(path):
        try:
            yield line, json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error)
            raise InputError(
                f"{path}:{line}: not JSON ({reason}); write one object a line, such as "
                '{"prompt": "..."}'
            ) from error


@contextlib.contextmanager
def _long_csv_fields() -> Iterator[None]:
    """Lift csv's limit of 128 KiB a field, which long prompts pass."""
    old = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(old)


def _csv(path: pathlib.Path, wanted: Sequence[str]) -> Iterator[tuple[int, Any]]:
    _text(path)  # for its message; below, a part is decoded at a time
    file = path.open(encoding="utf-8-sig", newline="")
    reader = csv.reader(file, strict=True)
    with file, _long_csv_fields():
        try:
            header = next(reader, [])
            _check_doubled(path, header, wanted)
            if not set(wanted) & set(header):
                columns = ", ".join(repr(c) for c in header) or "none"
                raise InputError(
                    f"{path}: no column {_either(wanted)} (columns: {columns:.500}); "
                    "name it in the first line"
                )
            line = reader.line_num + 1
            for row in reader:
                if not row:  # a blank line
                    line = reader.line_num + 1
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{path}:{line}: {len(row)} fields where the header has {len(header)}; "
                        "quote fields that hold commas or line breaks"
                    )
                # csv has no null: an empty field is one.
                yield line, {k: v or None for k, v in zip(header, row, strict=True)}
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _check_doubled(path: pathlib.Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    for name in (*_OTHERS, *wanted):
        if names.count(name) > 1:
            raise InputError(f"{path}: {names.count(name)} columns {name!r}; leave one")


def _parquet(path: pathlib.Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if not set(columns) & set(names):
            raise InputError(f"{path}: no column {_either(columns)} (columns: {names!s:.500})")
        _check_doubled(path, names, columns)
        if file.metadata.num_rows > _MOST_ROWS:
            raise _too_much(path, f"{file.metadata.num_rows} rows")
        wanted = [n for n in (*_OTHERS, *columns) if n in names]
        held, rows = 0, 0
        # A few rows at a time: one text may be stored once, and stand in every row.
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
            held += batch.nbytes
            if held > _MOST_BYTES:
                raise _too_much(path, f"more than {_MOST_BYTES >> 20} MiB")
            yield from enumerate(batch.to_pylist(), start=rows + 1)
            rows += batch.num_rows
    except (pyarrow.ArrowException, ValueError, OverflowError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable Parquet file ({reason})") from error


def _prompt(row: Any, line: int, where: str) -> Prompt:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: a row must be an object with `prompt` or `messages`")
    text, messages = row.get("prompt"), row.get("messages")
    if (text is None) == (messages is None):
        found = "neither `prompt` nor" if text is None else "both `prompt` and"
        raise InputError(f"{where}: the row has {found} `messages`; give one of them")
    if text is not None:
        check_text(text, where, "prompt")
    else:
        messages = messages_of(messages, where)
    tools = None if messages is None else tools_of(row.get("tools"), where)
    identity, label = row.get("id"), row.get("label")
    if identity is None:
        identity = line
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise InputError(f"{where}: `id` must be a text or a whole number, not {identity!r:.80}")
    if isinstance(identity, str):
        check_text(identity, where, "id")
    for field, value in (("id", identity), ("label", label)):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InputError(f"{where}: `{field}` is beyond 64 bits; write it as a text")
    if not (label is None or isinstance(label, str | int | float)) or (
        isinstance(label, float) and not math.isfinite(label)
    ):
        raise InputError(f"{where}: `label` must be a text, a finite number, true or false")
    if isinstance(label, str):
        check_encodes(label, where, "label")
    target = row.get("target")  # of an attack, or some other column of a user's own
    target = target if isinstance(target, str) and target.strip() else None
    return Prompt(identity, text, messages, label, line, target, tools)


def _check_unique(prompts: list[Prompt], path: pathlib.Path) -> None:
    # As text: 7 and "7" are one id in a .csv.
    seen: dict[str, int] = {}
    for p in prompts:
        if str(p.id) in seen:
            raise InputError(
                f"{path}:{p.line}: id {p.id!r} is already that of line {seen[str(p.id)]}; "
                "ids must be unique"
            )
        seen[str(p.id)] = p.line


def _check_labels(prompts: list[Prompt], path: pathlib.Path) -> None:
    """One kind of label a file, so that it makes one column of output."""
    kinds: dict[str, int] = {}
    for p in prompts:
        if p.label is not None:
            kind = "truth value" if isinstance(p.label, bool) else "number"
            kinds.setdefault("text" if isinstance(p.label, str) else kind, p.line)
    if len(kinds) > 1:
        (first, _), (other, line), *_ = kinds.items()
        raise InputError(
            f"{path}:{line}: `label` is a {other} where an earlier one is a {first}; use one kind"
        )
