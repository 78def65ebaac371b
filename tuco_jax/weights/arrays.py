"""Arrays between disk and devices, each device's shard without the others.

`assemble` puts an array on its devices a layer at a time: the host holds one layer of what its own
devices take. A CPU device adopts the host's memory, without a second copy.

`save` writes a tree through orbax. `Stored` reads it a chunk at a time, each device its own
shards: orbax itself reads every array before it places the first, which takes twice the memory of
what is held.
"""

import functools
import itertools
import math
import mmap
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int8, Shaped

from common_jax.distributed import meet
from common_jax.io.orbax_noise import quiet
from tuco_jax.weights import int8

__all__ = [
    "Bounds",
    "Fill",
    "Placement",
    "Stored",
    "assemble",
    "assemble_int8",
    "host_array",
    "is_layered",
    "layer_int8",
    "save",
]

# Where an array goes: (path, shape) -> a sharding, or None for the default device.
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]

_ALIGNMENT = 64  # bytes; XLA's CPU client adopts host memory that is aligned so
_LARGE = 1 << 20  # bytes, from which on an array has memory of its own from the system


def host_array(shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """An uninitialised array; dtype: any of JAX's.

    A large one goes back to the system when it is let go: the allocator would keep what layers
    that stream past leave behind, for each thread.
    """
    kind = np.dtype(jnp.dtype(dtype))
    size = int(np.prod(shape)) * kind.itemsize
    if size >= _LARGE:
        raw = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        return raw.view(kind).reshape(shape)
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


# First and last index, beyond it, along each axis.
Bounds = tuple[tuple[int, int], ...]
# (layer, parts): writes the numbers within the bounds of each part, of that layer, into its array.
Fill = Callable[[int, list[tuple[Bounds, np.ndarray]]], None]


def assemble(
    shape: tuple[int, ...],
    dtype: Any,
    where: jax.sharding.Sharding | None,
    fill: Fill,
    *,
    layered: bool,
) -> Shaped[Array, "..."]:
    """An array on its devices (None: the default one), of which the host holds a layer at a time.

    layered: axis 0 is that of layers, of which parts and their bounds have none; else there is one
    layer, 0, of all axes. Of several processes each fills its own devices' shards alone.
    """
    places: dict[Any, Bounds] = {None: tuple((0, size) for size in shape)}
    if where is not None:
        places = {
            device: tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
            for device, index in where.addressable_devices_indices_map(shape).items()
        }
    devices = jax.devices() if where is None else places
    on_host = all(device.platform == "cpu" for device in devices)
    shards = (_adopted if on_host else _sent)(places, dtype, fill, layered)
    if where is None:
        return shards[0]
    return jax.make_array_from_single_device_arrays(shape, where, shards)


def assemble_int8(
    path: str, shape: tuple[int, ...], placement: Placement | None, fill: Fill
) -> dict[str, Shaped[Array, "..."]]:
    """A stacked matrix, `path`, as int8, and its scales, each at its path; fill: its numbers.

    A scale is of all inputs. Where these are cut among processes, each reads and rounds other
    outputs, all inputs of them, and then they exchange what is rounded, a quarter of the bytes.
    """
    found, out = int8.Rounded(shape, fill), {}
    cuts = _by_outputs(placement(path, shape) if placement else None, shape)
    for cut, (name, size, kind, own) in zip(
        cuts,
        (
            (path, shape, int8.INT8, found.values),
            (int8.scale_of(path), found.scale.shape, "float32", found.scales),
        ),
        strict=True,
    ):
        where = placement(name, size) if placement else None
        array = assemble(size, kind, cut or where, own, layered=True)
        if cut:
            meet()  # those that are exchanged with may still read
            array = jax.block_until_ready(jax.device_put(array, where))
        out[name] = array
    return out


def _by_outputs(
    where: jax.sharding.Sharding | None, shape: tuple[int, ...]
) -> tuple[NamedSharding | None, NamedSharding | None]:
    """Where a matrix [.., I, O] and its scales lie while they are read: cut by outputs alone.

    None: where they are to lie. Of one process, all parts are read together.
    """
    if not isinstance(where, NamedSharding) or where.is_fully_addressable:
        return None, None
    *others, inputs, outputs = (*where.spec, *(None,) * (len(shape) - len(where.spec)))
    axes = tuple(axis for axis in (outputs, inputs) if axis is not None)
    if inputs is None or shape[-1] % math.prod(where.mesh.shape[axis] for axis in axes):
        return None, None
    matrix, scales = PartitionSpec(*others, None, axes), PartitionSpec(*others, axes)
    return NamedSharding(where.mesh, matrix), NamedSharding(where.mesh, scales)


def layer_int8(
    shape: tuple[int, ...], fill: Fill, index: int
) -> tuple[Int8[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """One layer of the two that `assemble_int8` gives, on the host."""
    found, host = int8.Rounded(shape, fill), host_array(shape[1:], np.int8)
    found.values(index, [(tuple((0, size) for size in host.shape), host)])
    return host, found.scale[index]


def _layers(bounds: Bounds, layered: bool) -> tuple[range, Bounds]:
    """The layers within bounds, and the bounds of one."""
    return (range(*bounds[0]), bounds[1:]) if layered else (range(1), bounds)


def _size(bounds: Bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)


def _adopted(
    places: dict[Any, Bounds], dtype: Any, fill: Fill, layered: bool
) -> list[Shaped[Array, "..."]]:
    """The shards of CPU devices: memory of the host, which devices with one shard share."""
    held = {bounds: host_array(_size(bounds), dtype) for bounds in places.values()}
    parts: dict[int, list[tuple[Bounds, np.ndarray]]] = {}
    for bounds, host in held.items():
        layers, own = _layers(bounds, layered)
        for row, layer in enumerate(layers):
            parts.setdefault(layer, []).append((own, host[row] if layered else host))
    for layer, some in parts.items():
        fill(layer, some)
    return [jax.device_put(held[bounds], device) for device, bounds in places.items()]


def _sent(
    places: dict[Any, Bounds], dtype: Any, fill: Fill, layered: bool
) -> list[Shaped[Array, "..."]]:
    """The shards of devices with memory of their own, each layer written into them in place."""
    shards = {
        device: jnp.zeros(_size(bounds), dtype, device=device) for device, bounds in places.items()
    }
    for layer in sorted({n for bounds in places.values() for n in _layers(bounds, layered)[0]}):
        parts: dict[Bounds, np.ndarray] = {}
        for bounds in places.values():
            layers, own = _layers(bounds, layered)
            if layer in layers and bounds not in parts:
                parts[bounds] = host_array(_size(own), dtype)
        fill(layer, [(_layers(bounds, layered)[1], part) for bounds, part in parts.items()])
        jax.block_until_ready(list(shards.values()))  # the host lets go of the layer before
        for device, bounds in places.items():
            if bounds in parts:
                part = jax.device_put(parts[bounds], device)
                row = layer - bounds[0][0] if layered else None
                shards[device] = _written(shards[device], part, row)
    return list(shards.values())


@functools.partial(jax.jit, donate_argnums=0)
def _written(
    shard: Shaped[Array, "..."], part: Shaped[Array, "..."], row: Any
) -> Shaped[Array, "..."]:
    """A shard with one of its layers written in place; row: None for all of it."""
    return part if row is None else jax.lax.dynamic_update_index_in_dim(shard, part, row, 0)


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

    dtype: from an array's path and what it is stored in, what to cast it to on the way (None: no
    cast); a matrix of floats in int8 is rounded, with scales (`int8.py`). check: sees what is
    read. Raises ValueError or OSError where something is missing or corrupt.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        dtype: Callable[[str, str], str] | None = None,
        check: Check | None = None,
    ) -> None:
        folder = pathlib.Path(directory).absolute()
        self._check = check

        def opened(found: Any) -> Any:
            stored = {"driver": "ocdbt", "base": f"file://{folder}", "path": f"{found.name}/"}
            return tensorstore.open({"driver": "auto", "kvstore": stored}, open=True, read=True)

        described: Any = flatten_dict(_described(folder), sep="/")
        waiting = {path: opened(found) for path, found in described.items()}
        self._arrays = {path: array.result() for path, array in waiting.items()}
        self.stored = {path: str(found.dtype) for path, found in described.items()}
        self._dtypes = {p: dtype(p, kind) if dtype else kind for p, kind in self.stored.items()}

    def read(self, placement: Placement | None = None, *, layers: bool = True) -> Any:
        """All arrays on their devices, each its own shards; or all but those with layers.

        placement: see `Placement`, with paths such as "layers/attention/q/kernel".
        """
        tree = {}
        for path, array in self._arrays.items():
            if layers or not is_layered(path):
                shape = tuple(array.shape)
                if self._is_rounded(path):
                    tree |= assemble_int8(path, shape, placement, self._layer_fill(path))
                else:
                    tree[path] = self._placed(path, placement(path, shape) if placement else None)
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
                if self._is_rounded(path):
                    found = layer_int8(tuple(array.shape), self._layer_fill(path), index)
                    tree[name], tree[int8.scale_of(name)] = found
                else:
                    bounds = ((index, index + 1), *((0, size) for size in array.shape[1:]))
                    tree[name] = self._part(path, bounds)[0]
        return unflatten_dict(tree, sep="/")

    def _is_rounded(self, path: str) -> bool:
        return self._dtypes[path] == int8.INT8 != self.stored[path]

    def _layer_fill(self, path: str) -> Fill:
        def fill(layer: int, parts: list[tuple[Bounds, np.ndarray]]) -> None:
            for bounds, part in parts:
                self._fill(path, ((layer, layer + 1), *bounds), part[None])

        return fill

    def _placed(self, path: str, where: jax.sharding.Sharding | None) -> jax.Array:
        array = self._arrays[path]
        chunk = array.chunk_layout.read_chunk.shape or (1,)
        layered = is_layered(path) and chunk[0] == 1  # else a chunk would be read for each layer

        def whole(_: int, parts: list[tuple[Bounds, np.ndarray]]) -> None:
            for bounds, part in parts:
                self._fill(path, bounds, part)

        fill = self._layer_fill(path) if layered else whole
        return assemble(tuple(array.shape), self._dtypes[path], where, fill, layered=layered)

    def _part(self, path: str, bounds: Bounds) -> np.ndarray:
        host = host_array(_size(bounds), self._dtypes[path])
        self._fill(path, bounds, host)
        return host

    def _fill(self, path: str, bounds: Bounds, host: np.ndarray) -> None:
        """Read what is within bounds."""
        array = self._arrays[path]
        cells = _cells(bounds, array.chunk_layout.read_chunk.shape or ())
        while some := list(itertools.islice(cells, _AT_ONCE)):
            for (_, inside), value in zip(some, [array[c].read() for c, _ in some], strict=True):
                with np.errstate(over="ignore"):  # of a cast: what it makes is for `check`
                    host[inside] = value.result()
                if self._check:
                    self._check(path, host[inside])


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
