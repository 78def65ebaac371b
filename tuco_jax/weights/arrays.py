"""Arrays between disk and devices, without a second copy: a CPU device adopts the host's memory.

`save` writes a tree through orbax. `Stored` reads it a chunk at a time, each device its own
shards: orbax itself reads every array before it places the first, which takes twice the memory of
what is held.
"""

import functools
import itertools
import mmap
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Shaped

from common_jax.io.orbax_noise import quiet

__all__ = ["Placement", "Stored", "host_array", "is_layered", "place", "save"]

# Where an array goes: (path, shape) -> a sharding, or None for the default device.
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]

_ALIGNMENT = 64  # bytes; XLA's CPU client adopts host memory that is aligned so
_LARGE = 1 << 20  # bytes, from which on an array has memory of its own from the system


def host_array(shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """An uninitialised array; dtype: any of JAX's.

    A large one goes back to the system when it is let go: the allocator would keep what layers
    that stream past leave behind, for each thread.
    """
    kind = np.dtype(jax.numpy.dtype(dtype))
    size = int(np.prod(shape)) * kind.itemsize
    if size >= _LARGE:
        raw = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        return raw.view(kind).reshape(shape)
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


def place(
    host: Shaped[np.ndarray, "*shape"], sharding: jax.sharding.Sharding | None
) -> Shaped[Array, "*shape"]:
    """The array on its devices; None: the default one. The host's array must not be used again."""
    if sharding is None:
        return jax.device_put(host)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


# Bytes that are written, and read, as one: of larger chunks the allocator keeps what is freed.
_CHUNK = 1 << 20
_AT_ONCE = 8  # chunks that are read at a time


def save(directory: str | pathlib.Path, tree: Any) -> None:
    """Write a tree of arrays; `directory` must not exist yet.

    Of what stands under "layers" a chunk holds one layer's alone, so that a layer can be read
    without the others.
    """

    def arguments(path: Any, _: Any) -> ocp.SaveArgs:
        axes = (0,) if is_layered(_name(path)) else ()
        return ocp.SaveArgs(chunk_byte_size=_CHUNK, shard_axes=axes)

    with quiet(), ocp.StandardCheckpointer() as checkpointer:
        save_args = jax.tree_util.tree_map_with_path(arguments, tree)
        checkpointer.save(pathlib.Path(directory).absolute(), tree, save_args=save_args)


def is_layered(path: str) -> bool:
    """Whether an array has layers on axis 0, by its path, such as "base/layers/mlp/up/kernel"."""
    return "layers" in path.split("/")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


Check = Callable[[str, np.ndarray], None]  # told an array's path and each chunk of it


class Stored:
    """A tree of arrays that `save` wrote, nested dicts, read when asked for.

    dtype: what to cast to on the way (None: as stored). check: sees what is read. Raises
    ValueError or OSError where something is missing or corrupt.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        dtype: str | None = None,
        check: Check | None = None,
    ) -> None:
        folder = pathlib.Path(directory).absolute()
        self._dtype, self._check = dtype, check

        def opened(found: Any) -> Any:
            stored = {"driver": "ocdbt", "base": f"file://{folder}", "path": f"{found.name}/"}
            return tensorstore.open({"driver": "auto", "kvstore": stored}, open=True, read=True)

        described: Any = flatten_dict(_described(folder), sep="/")
        waiting = {path: opened(found) for path, found in described.items()}
        self._arrays = {path: array.result() for path, array in waiting.items()}
        self._dtypes = {path: dtype or found.dtype for path, found in described.items()}

    def read(self, placement: Placement | None = None, *, layers: bool = True) -> Any:
        """All arrays on their devices, each its own shards; or all but those with layers.

        placement: see `Placement`, with paths such as "layers/attention/q/kernel".
        """
        tree = {}
        for path, array in self._arrays.items():
            if layers or not is_layered(path):
                where = placement(path, tuple(array.shape)) if placement else None
                tree[path] = self._placed(path, where)
        return unflatten_dict(tree, sep="/")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each array's shape, by its path."""
        return {path: tuple(array.shape) for path, array in self._arrays.items()}

    def layer(self, index: int) -> Any:
        """One layer of the arrays that have layers, on the host, their paths without "layers"."""
        tree = {}
        for path, array in self._arrays.items():
            if is_layered(path):
                name = "/".join(part for part in path.split("/") if part != "layers")
                bounds = ((index, index + 1), *((0, size) for size in array.shape[1:]))
                tree[name] = self._part(path, bounds)[0]
        return unflatten_dict(tree, sep="/")

    def _placed(self, path: str, where: jax.sharding.Sharding | None) -> jax.Array:
        array = self._arrays[path]

        @functools.cache  # devices that hold the same part share one reading
        def part(*bounds: tuple[int, int]) -> np.ndarray:
            return self._part(path, bounds)

        def shard(index: Any) -> np.ndarray:
            return part(*(s.indices(n)[:2] for s, n in zip(index, array.shape, strict=True)))

        if where is None:
            return jax.device_put(shard((slice(None),) * array.rank))
        return jax.make_array_from_callback(array.shape, where, shard)

    def _part(self, path: str, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
        array = self._arrays[path]
        host = host_array(tuple(stop - start for start, stop in bounds), self._dtypes[path])
        cells = _cells(bounds, array.chunk_layout.read_chunk.shape or ())
        while some := list(itertools.islice(cells, _AT_ONCE)):
            for (_, inside), value in zip(some, [array[c].read() for c, _ in some], strict=True):
                with np.errstate(over="ignore"):  # of a cast: what it makes is for `check`
                    host[inside] = value.result()
                if self._check:
                    self._check(path, host[inside])
        return host


def _described(directory: str | pathlib.Path) -> Any:
    """The tree with orbax's description of each array."""
    # Orbax would begin to read every array, and its threads to complain, each for itself.
    for name in ("_METADATA", "manifest.ocdbt"):
        path = pathlib.Path(directory) / name
        if not path.is_file() or not path.stat().st_size:
            raise ValueError(f"{path} is missing or empty")
    stored = {"driver": "ocdbt", "base": f"file://{pathlib.Path(directory).absolute()}"}
    if not tensorstore.KvStore.open(stored).result().list().result():
        raise ValueError(f"{directory} holds no array")
    with quiet(), ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(pathlib.Path(directory).absolute()).item_metadata
    if metadata is None:
        raise ValueError(f"{directory} holds no whole checkpoint")
    return metadata.tree


def _cells(bounds: Sequence[tuple[int, int]], chunk: Sequence[int]) -> Iterator[tuple[Any, Any]]:
    """Where each chunk that meets the bounds lies in the array, and in what is read of it."""

    def along(start: int, stop: int, size: int) -> Iterator[tuple[slice, slice]]:
        for at in range(start - start % size, stop, size):
            low, high = max(at, start), min(at + size, stop)
            yield slice(low, high), slice(low - start, high - start)

    for cell in itertools.product(*(along(*b, n) for b, n in zip(bounds, chunk, strict=True))):
        yield tuple(c for c, _ in cell), tuple(c for _, c in cell)
