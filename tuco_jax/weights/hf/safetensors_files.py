"""Reading safetensors files a tensor, or a block of its rows, at a time.

Plain file reads rather than a memory map: a map's pages count as memory held until it is closed.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from common_jax.errors import InputError

__all__ = ["SafetensorsFile", "SafetensorsTensors", "StoredTensor"]

_PAGE = 4096  # bytes, of which a disk reads no fewer
_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


class StoredTensor(NamedTuple):
    """A tensor's place: dtype as the format names it, shape, first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class SafetensorsFile:
    """The header of one file, checked; tensors are read when asked for.

    Raises InputError that names the file where it is truncated, corrupt or unreadable.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            with safe_open(path, "numpy"):  # checks that header and size agree
                pass
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0].removeprefix("Error while deserializing header: ")
            raise InputError(
                f"{path}: truncated or corrupt safetensors ({reason}); fetch the file again"
            ) from None
        header.pop("__metadata__", None)
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(
                entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            )
            for name, entry in header.items()
        }

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Shaped[np.ndarray, "..."]:
        """The tensor, or those rows of its first axis, in its own dtype.

        columns: of a matrix, those of its second axis; of long rows no others are read.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in _DTYPES:
            raise InputError(
                f"{self.path}: tensor {name} is stored as {tensor.dtype}; "
                f"only {', '.join(_DTYPES)} are read: convert the checkpoint to one of them"
            )
        dtype = np.dtype(_DTYPES[tensor.dtype])
        width = math.prod(tensor.shape[1:])
        if not tensor.shape:
            return self._runs(name, dtype, [0], 1).reshape(())
        first, last, _ = rows.indices(tensor.shape[0])
        if columns != slice(None):
            left, right, _ = columns.indices(width)
            if _PAGE <= (right - left) * dtype.itemsize <= width * dtype.itemsize // 2:
                starts = range(first * width + left, last * width, width)
                return self._runs(name, dtype, starts, right - left)
        value = self._runs(name, dtype, [first * width], (last - first) * width)
        value = value.reshape(-1, *tensor.shape[1:])
        return value if columns == slice(None) else value[:, columns]

    def _runs(
        self, name: str, dtype: np.dtype, starts: Sequence[int], count: int
    ) -> Shaped[np.ndarray, "runs count"]:
        """Numbers of a tensor that lie side by side, from each start, counted from its first."""
        out = np.empty((len(starts), count), dtype)
        with open(self.path, "rb") as file:
            for start, run in zip(starts, out.view(np.uint8), strict=True):
                file.seek(self.tensors[name].start + start * dtype.itemsize)
                if file.readinto(run.data) != run.size:
                    raise InputError(
                        f"{self.path}: truncated in tensor {name}; fetch the file again"
                    )
        return out


class SafetensorsTensors:
    """The tensors of some files as a `TensorSource`, under the names that they are stored by."""

    def __init__(self, name: str, files: Iterable[SafetensorsFile]) -> None:
        self.name = name
        self._places: dict[str, SafetensorsFile] = {}
        for file in files:
            for tensor in file.tensors:
                if (other := self._places.setdefault(tensor, file)) is not file:
                    raise InputError(
                        f"{file.path}: tensor {tensor} is doubled: "
                        f"{other.path} holds it, too; remove one"
                    )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: file.tensors[name].shape for name, file in self._places.items()}

    def file(self, tensor: str) -> str:
        return str(self._places[tensor].path)

    def stored(self, tensor: str) -> str:
        kind = self._places[tensor].tensors[tensor].dtype
        return np.dtype(_DTYPES[kind]).name if kind in _DTYPES else kind

    def read(
        self, tensor: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Shaped[np.ndarray, "..."]:
        return self._places[tensor].read(tensor, rows, columns)
