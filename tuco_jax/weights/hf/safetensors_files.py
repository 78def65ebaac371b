"""Reading safetensors files a tensor, or a block of its rows, at a time.

Plain file reads rather than a memory map: a map's pages count as memory held until it is closed.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from common_jax.errors import InputError

__all__ = ["SafetensorsFile", "SafetensorsTensors", "StoredTensor"]

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

    def read(self, name: str, rows: slice = slice(None)) -> Shaped[np.ndarray, "..."]:
        """The tensor, or those rows of its first axis, in its own dtype."""
        tensor = self.tensors[name]
        if tensor.dtype not in _DTYPES:
            raise InputError(
                f"{self.path}: tensor {name} is stored as {tensor.dtype}; "
                f"only {', '.join(_DTYPES)} are read: convert the checkpoint to one of them"
            )
        dtype = np.dtype(_DTYPES[tensor.dtype])
        shape, skip = tensor.shape, 0
        if shape and rows != slice(None):
            first, last, _ = rows.indices(shape[0])
            skip = first * int(np.prod(shape[1:]))
            shape = (last - first, *shape[1:])
        count = int(np.prod(shape))
        with open(self.path, "rb") as file:
            file.seek(tensor.start + skip * dtype.itemsize)
            data = np.fromfile(file, np.uint8, count * dtype.itemsize)
        if data.size != count * dtype.itemsize:
            raise InputError(f"{self.path}: truncated in tensor {name}; fetch the file again")
        return data.view(dtype).reshape(shape)


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

    def read(self, tensor: str, rows: slice = slice(None)) -> Shaped[np.ndarray, "..."]:
        return self._places[tensor].read(tensor, rows)
