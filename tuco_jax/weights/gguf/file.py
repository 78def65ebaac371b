"""Reading a GGUF file: metadata, and tensors a block of rows at a time, dequantised.

The header is read here because the `gguf` package's reader makes an array of every token of the
vocabulary: a minute and 900 MB for Gemma's. Formats and dequantisation are that package's.
"""

import itertools
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import gguf
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from jaxtyping import Float

from common_jax.errors import InputError

__all__ = ["GGUFFile", "StoredTensor"]

_FLOATS = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_VERSIONS = (2, 3)


class StoredTensor(NamedTuple):
    """A tensor's place: type as ggml names it, shape [rows, columns], first byte in the file."""

    type: str
    shape: tuple[int, ...]
    start: int


class GGUFFile:
    """The header of one file, checked; tensors are read when asked for.

    `metadata`: numbers, strings, lists of strings, arrays of numbers. Raises InputError that names
    the file, and the tensor if it is one's fault, where the file is unreadable, truncated, corrupt
    or holds a type that is not supported.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = _Header(file, size)
                self.metadata: dict[str, Any] = header.metadata()
                self.tensors = header.tensors(self.metadata.get("general.alignment", 32))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except _Corrupt as error:
            raise InputError(f"{path}: {error}") from None

    def read(self, tensor: str, rows: slice = slice(None)) -> Float[np.ndarray, "..."]:
        """The tensor, or those rows of its first axis; float32, float16 or bfloat16."""
        kind, shape, start = self.tensors[tensor]
        if kind in _BLOCKS and len(shape) < 2:  # blocks run along its only axis
            return self._values(kind, shape, start)[rows]
        first, last, _ = rows.indices(shape[0])
        row = _bytes(kind, shape[1:])
        return self._values(kind, (max(last - first, 0), *shape[1:]), start + first * row)

    def _values(self, kind: str, shape: tuple[int, ...], start: int) -> np.ndarray:
        raw = np.fromfile(self.path, np.uint8, _bytes(kind, shape), offset=start)
        if kind in _FLOATS:
            return raw.view(_FLOATS[kind]).reshape(shape)
        raw = raw.reshape(*shape[:-1], _bytes(kind, shape[-1:]))
        with np.errstate(all="ignore"):  # the caller looks for what is not finite
            return gguf.dequantize(raw, GGMLQuantizationType[kind]).reshape(shape)


class _Corrupt(Exception):
    """What is wrong with a header, without the file's name."""


class _Header:
    """A cursor over the header; every length is checked against what the file has left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        if self._take(4) != b"GGUF":
            raise _Corrupt("is not a GGUF file")
        version = self._number("<u4")
        if version not in _VERSIONS:
            raise _Corrupt(f"GGUF version {version} is not supported; convert the model again")
        self._tensors, self._fields = self._number("<u8"), self._number("<u8")

    def metadata(self) -> dict[str, Any]:
        fields = {}
        for _ in range(self._fields):
            key = self._string()
            fields[key] = self._value(self._number("<u4"))
        return fields

    def tensors(self, alignment: int) -> dict[str, StoredTensor]:
        """The table of tensors, which follows the metadata, as places in the file."""
        table = [self._tensor() for _ in range(self._tensors)]
        if not isinstance(alignment, int) or alignment < 1:
            raise _Corrupt(f"general.alignment is {alignment!r}; the file is corrupt")
        data = -(-self._file.tell() // alignment) * alignment
        places = {}
        for name, kind, shape, offset in table:
            if name in places:
                raise _Corrupt(f"tensor {name} is doubled; the file is corrupt")
            places[name] = StoredTensor(kind, shape, data + offset)
            end = data + offset + _bytes(kind, shape)
            if end > self._size:
                raise _Corrupt(
                    f"tensor {name} ends at byte {end}, but the file has {self._size}; "
                    "it is truncated: copy or download it again"
                )
        _check_apart(places)
        return places

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        name = self._string()
        axes = self._number("<u4")
        if not 1 <= axes <= 4:
            raise _Corrupt(f"tensor {name} has {axes} axes; the file is corrupt")
        shape = tuple(self._number("<u8") for _ in range(axes))[::-1]  # fastest axis first
        if not all(shape):
            raise _Corrupt(f"tensor {name} has shape {list(shape)}, no numbers; it is corrupt")
        number, offset = self._number("<u4"), self._number("<u8")
        known = number in {t.value for t in GGMLQuantizationType}
        kind = GGMLQuantizationType(number).name if known else f"number {number}"
        if kind not in _FLOATS and kind not in _BLOCKS:
            raise _Corrupt(
                f"tensor {name} has type {kind}, which is not supported; "
                f"supported are {', '.join((*_FLOATS, *_BLOCKS))}"
            )
        if kind in _BLOCKS and shape[-1] % _block(kind)[0]:
            raise _Corrupt(
                f"tensor {name} has {shape[-1]} columns, not a multiple of {kind}'s block of "
                f"{_block(kind)[0]}; the file is corrupt"
            )
        return name, kind, shape, offset

    def _value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind == GGUFValueType.ARRAY:
            item, count = self._number("<u4"), self._number("<u8")
            if item == GGUFValueType.STRING:
                return [self._string() for _ in range(count)]
            return self._numbers(self._format(item), count)
        return self._number(self._format(kind))

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise _Corrupt(f"metadata of type number {kind} is unknown; the file is corrupt")
        return _SCALARS[GGUFValueType(kind)]

    def _number(self, format: str) -> Any:
        value = self._numbers(format, 1)[0]
        if format == "<f4":  # 1e-5, not the double nearest to float32's 1e-5
            return float(str(value))
        return value.item()

    def _numbers(self, format: str, count: int) -> np.ndarray:
        dtype = np.dtype(format)
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _string(self) -> str:
        (length,) = struct.unpack("<Q", self._take(8))
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise _Corrupt("a string in the header is not UTF-8; the file is corrupt") from None

    def _take(self, count: int) -> bytes:
        if count > self._size or len(data := self._file.read(count)) < count:
            raise _Corrupt("the header is truncated or corrupt: copy or download the file again")
        return data


def _check_apart(places: Mapping[str, StoredTensor]) -> None:
    """Tensors that share bytes could fill any memory from a small file."""
    ordered = sorted(places.items(), key=lambda item: item[1].start)
    for (one, first), (other, second) in itertools.pairwise(ordered):
        if first.start + _bytes(first.type, first.shape) > second.start:
            raise _Corrupt(f"tensors {one} and {other} share bytes; the file is corrupt")


def _block(kind: str) -> tuple[int, int]:
    """Numbers in a block, and its bytes."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    numbers, size = _block(kind)
    count = 1
    for axis in shape:  # Python's integers: a corrupt shape must not overflow
        count *= axis
    return count // numbers * size
