"""Storage of the carries of many batches between layers, in host memory and on disk.

Carries beyond a memory budget are stored in a file, so that memory does not bound how many batches
go through a layer together.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from common_jax.errors import InputError

__all__ = ["CarryStore"]


class _Place(NamedTuple):
    """A leaf on disk: its first byte, shape and dtype."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype


class CarryStore:
    """A list of trees of arrays, in host memory or, beyond a budget, in a file.

    One thread fetches them from the device, writes and reads them, in order: while one computes,
    the one before it is stored and the next one loaded. The shapes of an item must not change.

    memory: bytes. folder: of the file, which has no name there, and ends with its process. Raises
    InputError where it cannot be written.
    """

    def __init__(self, count: int, memory: int, folder: str | pathlib.Path) -> None:
        self._count, self._memory, self._folder = count, memory, pathlib.Path(folder)
        self._thread = ThreadPoolExecutor(1, "streams")
        self._held: dict[int, Any] = {}
        self._places: dict[int, Any] = {}
        self._bytes = self._end = 0  # in memory, and in the file
        self._file: Any = None
        self._failed: InputError | None = None
        self._coming: tuple[int, Future[Any]] | None = None
        self._going: list[Future[None]] = []

    def __len__(self) -> int:
        return self._count

    def __setitem__(self, index: int, tree: Any) -> None:
        """Store an item, without waiting for it, unless two are being stored already."""
        if self._coming is not None and self._coming[0] == index:
            self._coming = None  # it is the old item
        self._going.append(self._thread.submit(self._put, index, tree))
        if len(self._going) > 1:
            self._going.pop(0).result()

    def __getitem__(self, index: int) -> Any:
        """The item as host arrays; the next one is loaded meanwhile."""
        coming = self._coming
        if coming is None or coming[0] != index:
            coming = index, self._thread.submit(self._get, index)
        following = (index + 1) % self._count
        self._coming = following, self._thread.submit(self._get, following)
        return coming[1].result()

    def settle(self) -> None:
        """Wait until every item is stored."""
        while self._going:
            self._going.pop(0).result()

    def close(self) -> None:
        """Free all items, and the file."""
        self._thread.shutdown(cancel_futures=True)
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def _put(self, index: int, tree: Any) -> None:
        host = jax.tree.map(np.asarray, tree)
        if index not in self._held and index not in self._places:
            size = sum(x.nbytes for x in jax.tree.leaves(host))
            if self._bytes + size > self._memory:
                self._places[index] = jax.tree.map(self._reserved, host)
            else:
                self._bytes += size
        if index in self._places:
            self._write(host, self._places[index])
        else:
            self._held[index] = host

    def _reserved(self, x: Shaped[np.ndarray, "..."]) -> _Place:
        place = _Place(self._end, x.shape, x.dtype)
        self._end += x.nbytes
        return place

    def _write(self, host: Any, places: Any) -> None:
        with self._errors():
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)
            jax.tree.map(self._write_leaf, host, places)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """A failure of the file as an InputError, which every later use of it raises, too."""
        if self._failed is not None:
            raise self._failed
        try:
            yield
        except OSError as error:
            self._failed = InputError(
                f"{self._folder}: residual streams cannot be kept there "
                f"({error.strerror or error}); free some space, or give them more memory"
            )
            raise self._failed from None

    def _write_leaf(self, x: np.ndarray, place: _Place) -> None:
        left, at = _bytes(np.ascontiguousarray(x)), place.start
        while left:
            done = os.pwrite(self._file.fileno(), left, at)
            left, at = left[done:], at + done

    def _get(self, index: int) -> Any:
        if index in self._places:
            places = self._places[index]
            with self._errors():
                return jax.tree.map(self._read_leaf, places, is_leaf=_is_place)
        return self._held[index]

    def _read_leaf(self, place: _Place) -> np.ndarray:
        host = np.empty(place.shape, place.dtype)
        left, at = _bytes(host), place.start
        while left:
            done = os.preadv(self._file.fileno(), [left], at)
            if not done:
                raise OSError("the file was cut short")
            left, at = left[done:], at + done
        return host


def _is_place(x: Any) -> bool:
    return isinstance(x, _Place)


def _bytes(x: np.ndarray) -> memoryview:
    """The bytes of a contiguous array of any dtype."""
    return x.reshape(-1).view(np.uint8).data
