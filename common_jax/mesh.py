"""Where a program runs: a mesh for `jax.jit`, or `jax.pmap` over data alone.

A mesh has three axes: "data" (whole copies of the parameters), "fsdp" (parameters are sharded, and
gathered when used; the batch is sharded over data and fsdp) and "tensor" (single matrices are
sharded). `jax.jit` over a mesh is the default way. `pmap` is in JAX's maintenance mode: it is
offered for data parallelism alone, through one thin wrapper.

Legend: B rows of a batch.
"""

import base64
import contextlib
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from common_jax.distributed import beat, by_first, count
from common_jax.errors import InputError

__all__ = [
    "AXES",
    "arrays_by_first",
    "batch_sharding",
    "constrain",
    "cores",
    "cudnn_width",
    "fetch",
    "fetch_row",
    "make_mesh",
    "mesh_for",
    "pmap",
    "on_all_devices",
    "part_cpu",
    "put",
    "read_shards",
    "replicate",
    "traced_mesh",
]

AXES = ("data", "fsdp", "tensor")  # rows are sharded over the first two


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with axes data, fsdp and tensor over the first `data * fsdp * tensor` devices.

    One size may be -1: as many as there are devices left for it. Settings in a file or on a
    command line go in as `make_mesh(**settings)`. Raises InputError where sizes and devices do
    not match.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    free = [axis for axis, size in sizes.items() if size == -1]
    bad = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    if bad or len(free) > 1:
        raise InputError(
            f"mesh {data} x {fsdp} x {tensor} (data x fsdp x tensor): sizes are 1 or more, "
            "and one of them may be -1 for all devices that are left"
        )
    wanted = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(len(devices) // wanted, 1)
        wanted *= sizes[free[0]]
    if wanted > len(devices):
        raise InputError(
            f"mesh {data} x {fsdp} x {tensor} (data x fsdp x tensor) wants {wanted} devices, but "
            f"there are {len(devices)}: choose smaller sizes"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:wanted]
    )


def mesh_for(sizes: Mapping[str, int] | None) -> Mesh | None:
    """`make_mesh(**sizes)`, or None for one device, whose programs need no mesh.

    Sizes that are not given are 1. Over several processes a mesh takes all devices of all of them:
    along data, where no size is given. A CPU is as many devices as the mesh has, up to its cores,
    where it is not in use yet.
    """
    many = count() > 1
    if sizes is None or set(sizes.values()) <= {1}:
        if not many:
            return None
        sizes = {"data": -1}
    part_cpu(math.prod(sizes.values()))
    mesh = make_mesh(sizes.get("data", 1), sizes.get("fsdp", 1), sizes.get("tensor", 1))
    if many and mesh.size != len(jax.devices()):
        raise InputError(
            f"mesh {' x '.join(map(str, mesh.devices.shape))} (data x fsdp x tensor): over "
            f"{count()} processes it takes all of their {len(jax.devices())} devices"
        )
    return mesh if mesh.size > 1 else None


def part_cpu(wanted: int) -> None:
    """Let the CPU be so many devices, up to its cores: of one, small steps leave cores idle.

    Where devices are in use, were counted in XLA_FLAGS or are those of several processes, they
    stay as they are.
    """
    counted = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if 1 < wanted <= cores() and not counted and count() == 1:
        with contextlib.suppress(RuntimeError):  # in use
            jax.config.update("jax_num_cpu_devices", wanted)


def cores() -> int:
    """Those that this process may use, where the system says; else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cudnn_width() -> int:
    """The widest attention head that cuDNN takes on this process's GPUs; 0: it takes none."""
    stated = [getattr(d, "compute_capability", "") for d in jax.devices() if d.platform == "gpu"]
    known = [float(x) if x[:1].isdecimal() else 0.0 for x in stated]  # AMD's is such as gfx90a
    least = min(known, default=0.0)
    return 256 if least >= 9 else 128 if least >= 8 else 0


def batch_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
    """Rows [B, ...] sharded over data and fsdp; over fewer axes where `rows` does not divide."""
    axes = AXES[:2]
    while rows is not None and rows % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return NamedSharding(mesh, PartitionSpec(axes or None))


def put(tree: PyTree[Any], shardings: PyTree[Any]) -> PyTree[Shaped[Array, "..."]]:
    """Arrays on their shards; of several processes, each fills those of its own devices alone.

    tree: arrays that are the same in every process, or lie over all of their devices already.
    shardings: one for all, or a tree of them.
    """
    if count() == 1:
        return jax.device_put(tree, shardings)

    def place(x: Any, where: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, where)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(place, tree, jax.tree.broadcast(shardings, tree))


def read_shards(
    shape: tuple[int, ...],
    where: jax.sharding.Sharding | None,
    read: Callable[[tuple[slice, ...]], Shaped[np.ndarray, "..."]],
) -> Shaped[Array, "..."]:
    """An array on its devices (None: the default one), each of which is given its own part.

    read: a part's place, a slice along each axis, -> its numbers; asked once for each part, and of
    several processes each asks for those of its own devices alone. The host holds one at a time.
    """
    if where is None:
        return jnp.asarray(read(tuple(slice(0, size) for size in shape)))
    devices = where.addressable_devices_indices_map(shape)
    owners: dict[Any, list[Any]] = {}
    for device, index in devices.items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    shards = {}
    for bounds, together in owners.items():
        part = read(tuple(slice(*ends) for ends in bounds))
        shards |= {device: jax.device_put(part, device) for device in together}
    return jax.make_array_from_single_device_arrays(shape, where, [shards[d] for d in devices])


def on_all_devices() -> NamedSharding:
    """A copy on every device of every process."""
    return NamedSharding(make_mesh(data=-1), PartitionSpec())


_AT_ONCE = 1 << 26  # bytes of an array that are put on every device at a time, to be fetched


def fetch(tree: PyTree[Any]) -> PyTree[Any]:
    """Arrays on the host, whole in every process; as `jax.device_get` in one.

    Of several processes each device holds, of one array at a time, no more than 64 MB that are not
    its own, or of a larger one a row of axis 0 (a layer).
    """
    beat()
    if count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: _gathered(x) if _is_spread(x) else jax.device_get(x), tree)


def arrays_by_first(
    act: Callable[[], Mapping[str, Shaped[np.ndarray, "..."]]],
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """`by_first` of arrays by name, bit for bit: what `act` gives in process 0, in every process.

    For what processes must not compute each for itself, since rounding differs between processors.
    Small arrays: they go through process 0's store, and not between devices.
    """
    if count() == 1:
        return dict(act())

    def packed() -> dict[str, Any]:
        return {
            name: [x.dtype.str, x.shape, base64.b64encode(x.tobytes()).decode()]
            for name, x in act().items()
        }

    return {
        name: np.frombuffer(base64.b64decode(text), dtype).reshape(shape).copy()
        for name, (dtype, shape, text) in by_first(packed).items()
    }


def fetch_row(x: Shaped[Array, "N ..."], index: int) -> Shaped[np.ndarray, "..."]:
    """`x[index]` on the host, whole in every process; axis 0 must not be sharded.

    Nothing else of it leaves its device.
    """
    beat()
    if not _is_spread(x) and all(device.platform == "cpu" for device in x.devices()):
        found = np.empty(x.shape[1:], x.dtype)
        for shard in x.addressable_shards:  # the host's memory: looked into, not copied
            found[shard.index[1:]] = np.asarray(shard.data)[index]
        return found
    where = x.sharding if isinstance(x.sharding, NamedSharding) else None
    row = _cut(where, 1)(x, np.int32(index))
    return jax.device_get(_whole(row) if _is_spread(row) else row)[0]


def _is_spread(x: Any) -> bool:
    """Whether it is an array of which this process has not all."""
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


def _gathered(x: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """An array that is spread over processes, some rows of each device's part after others."""
    if x.nbytes <= _AT_ONCE or not x.ndim:
        return jax.device_get(_whole(x))
    assert isinstance(x.sharding, NamedSharding)
    own = x.sharding.shard_shape(x.shape)[0]
    rows = min(max(1, _AT_ONCE * own // x.nbytes), own)
    found = np.empty((len(x) // own, own, *x.shape[1:]), x.dtype)
    for start in range(0, own, rows):
        begin = min(start, own - rows)  # the last ones are as many: one program
        some = jax.device_get(_whole(_cut(x.sharding, rows)(x, np.int32(begin))))
        found[:, begin : begin + rows] = some.reshape(len(found), rows, *x.shape[1:])
    return found.reshape(x.shape)


@functools.lru_cache(maxsize=64)
def _cut(where: NamedSharding | None, rows: int) -> Callable[..., Any]:
    """(x, start) -> so many rows, from `start` on, of each device's part of an array."""

    def own(x: Shaped[Array, "n ..."], start: Any) -> Shaped[Array, "rows ..."]:
        return jax.lax.dynamic_slice_in_dim(x, start, rows)

    if where is None:
        return jax.jit(own)
    given = where.spec, PartitionSpec()
    return jax.jit(jax.shard_map(own, mesh=where.mesh, in_specs=given, out_specs=where.spec))


def _whole(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """An array, all of it on every device."""
    assert isinstance(x.sharding, NamedSharding)
    return _replicated(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)


@functools.lru_cache(maxsize=8)
def _replicated(where: NamedSharding) -> Callable[[Any], Any]:
    return jax.jit(lambda x: x, out_shardings=where)


def constrain(
    tree: PyTree[Shaped[Array, "B ..."]], mesh: Mesh | None
) -> PyTree[Shaped[Array, "B ..."]]:
    """Keep each array of a tree sharded by rows: weights move between devices, activations stay.

    Otherwise the compiler may shard activations as the weights are, and sum them over devices
    after each product. Without a mesh, the tree as it is.
    """
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh, x.shape[0])), tree
    )


def traced_mesh(tree: PyTree[Shaped[Array, "..."]]) -> Any:
    """In a compiled function, the mesh of `make_mesh` that the types of arrays tell; else None."""
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        auto = all(kind == AxisType.Auto for kind in mesh.axis_types)
        if mesh.axis_names == AXES and auto:
            return mesh
    return None


def replicate(
    tree: PyTree[Shaped[Array, "..."]], devices: Sequence[Any] | None = None
) -> PyTree[Shaped[Array, "..."]]:
    """A copy of every array on every device, so that calls of a `pmap` need not broadcast it."""
    devices = jax.local_devices() if devices is None else list(devices)
    mesh = make_mesh(data=len(devices), devices=devices)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def pmap(
    function: Callable[..., Any],
    *,
    devices: Sequence[Any] | None = None,
    out_axes: Any = 0,
) -> Callable[..., Any]:
    """`function(params, *batch)` with the batch split over devices, under `jax.pmap`.

    Every array in `batch` has the same leading axis B, and `params` goes whole to each device.
    out_axes: the axis of B in the results, an int or a tree of them (a prefix of the result, as in
    `jax.vmap`). Rows must be independent of each other: B is padded up to a multiple of the
    devices by repeating the last row, and the padding is removed from the results, so that the
    wrapped function has the signature and the results of `function`.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    count = len(devices)

    @functools.cache
    def mapped(arguments: int) -> Callable[..., Any]:
        in_axes = (None,) + (0,) * arguments
        return jax.pmap(function, in_axes=in_axes, out_axes=out_axes, devices=devices)

    def run(params: Any, *batch: Any) -> Any:
        rows = {x.shape[0] for x in jax.tree.leaves(batch)}
        if len(rows) != 1:
            raise ValueError(f"arrays of one batch have {sorted(rows)} rows")
        (size,) = rows

        def split(x: Shaped[Array, "B ..."]) -> Shaped[Array, "devices b ..."]:
            x = jnp.asarray(x)
            padding = [(0, -size % count)] + [(0, 0)] * (x.ndim - 1)
            return jnp.pad(x, padding, mode="edge").reshape(count, -1, *x.shape[1:])

        def join(x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
            x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
            return jax.lax.slice_in_dim(x, 0, size, axis=axis)

        out = mapped(len(batch))(params, *jax.tree.map(split, batch))
        return jax.tree.map(join, out, jax.tree.broadcast(out_axes, out))

    return run
