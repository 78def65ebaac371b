"""What a program would take on devices that are not here: compiled for a mesh, never run.

    with devices(64):
        mesh = make_mesh(1, 8, 8)
        found = plan(function, {"base": base, "inputs": rows}, mesh)
    print(found.on(DEVICES["tpu-v5e"]))

Arguments are `jax.ShapeDtypeStruct`s with shardings. XLA compiles the partitioned program for
fake CPU devices. Arguments and results are those of any device. Temporaries are those of the
program as CPUs run it, at most: they cast bfloat16 to multiply it, and their attention holds more
than an accelerator's kernels do. Weights that they cast before they gather them count as stored.

Legend of the report: bytes are of one device, FLOPs of all.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from common_jax.cost import (
    LARGEST,
    Collective,
    collectives,
    flops_by_type,
    products,
    shard_bytes,
    uncountable,
)
from common_jax.errors import InputError
from common_jax.io.files import check_writable, write_json
from common_jax.mesh import batch_sharding
from common_jax.partition import whole_along_fsdp

__all__ = [
    "DEVICES",
    "Device",
    "Plan",
    "abstract",
    "check_sizes",
    "devices",
    "plan",
    "report",
    "rows",
]

_MOST = 1024  # fake devices


@dataclasses.dataclass(frozen=True)
class Device:
    """What one device has, by its maker.

    memory: bytes. bandwidth: of it, bytes/s. link: to other devices, bytes/s sent. rates: FLOP/s
    of matrix products, by the type of their operands. source: where these figures stand.
    """

    name: str
    memory: float
    bandwidth: float
    link: float
    rates: Mapping[str, float]
    source: str


DEVICES = {
    # Float32 products are six passes of bfloat16 (XLA's HIGHEST). A link's two directions are
    # 400 GB/s together.
    "tpu-v5e": Device(
        "TPU v5e",
        16e9,
        819e9,
        200e9,
        {"bfloat16": 197e12, "float16": 197e12, "float32": 197e12 / 6},
        "docs.cloud.google.com/tpu/docs/v5e",
    ),
    # Dense rates of the tensor cores; float32 without TF32. NVLink's two directions are 900 GB/s.
    "h100": Device(
        "H100 80 GB (SXM)",
        80e9,
        3350e9,
        450e9,
        {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
        "nvidia.com/en-us/data-center/h100",
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program takes.

    bytes: on one device, by kind: of each argument, of "output" and of "temporaries". products:
    FLOPs of all devices, by the type of operands. traffic: bytes that one device's products read
    and write, at least. exchanges: of one device. dtype: of the weights. mesh: sizes of its axes.
    precision: how products take activations, where that is not the weights' type.
    """

    bytes: Mapping[str, int]
    products: Mapping[str, float]
    traffic: float
    exchanges: tuple[Collective, ...]
    dtype: str
    mesh: Mapping[str, int]
    precision: str = ""

    @property
    def flops(self) -> float:
        """Of all devices, all types together."""
        return sum(self.products.values())

    @property
    def held(self) -> int:
        """Bytes on one device, all kinds together."""
        return sum(self.bytes.values())

    @property
    def size(self) -> int:
        """How many devices."""
        return math.prod(self.mesh.values())

    @property
    def intensity(self) -> float:
        """FLOPs for each byte that a device's memory gives or takes."""
        return self.flops / self.size / self.traffic

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(one.times * one.sent for one in self.exchanges)

    def kinds(self) -> dict[str, dict[str, float]]:
        """Exchanges by kind: how many a run has, and the bytes that a device sends."""
        found: dict[str, dict[str, float]] = {}
        for one in self.exchanges:
            kind = found.setdefault(one.kind, {"count": 0, "bytes": 0.0})
            kind["count"] += one.times
            kind["bytes"] += one.times * one.sent
        return found

    def seconds(self, device: Device) -> dict[str, float]:
        """The least time of a run by each limit, at the device's peak."""
        rates, slowest = device.rates, device.rates["float32"]
        busy = sum(flops / rates.get(kind, slowest) for kind, flops in self.products.items())
        return {
            "compute": busy / self.size,
            "memory bandwidth": self.traffic / device.bandwidth,
            "links": self.sent / device.link,
        }

    def binds(self, device: Device) -> str:
        """The limit that binds."""
        if self.held > device.memory:
            return "memory"
        seconds = self.seconds(device)
        return max(seconds, key=lambda name: seconds[name])

    def on(self, device: Device) -> dict[str, Any]:
        """All of it, for a report or a file."""
        return {
            "device": dataclasses.asdict(device),
            "mesh": dict(self.mesh),
            "dtype": self.dtype,
            **({"precision": self.precision} if self.precision else {}),
            "bytes_a_device": {**self.bytes, "all": self.held},
            "flops": self.flops,
            "flops_by_type": dict(self.products),
            "traffic_a_device": self.traffic,
            "flops_a_byte": self.intensity,
            "collectives": self.kinds(),
            "seconds_at_peak": self.seconds(device),
            "binds": self.binds(device),
        }

    def lines(self, device: Device) -> list[str]:
        """The same in words."""
        seconds, most = self.seconds(device), device.memory
        parts = ", ".join(f"{name} {_amount(size)}" for name, size in self.bytes.items() if size)
        types = ", ".join(f"{kind} {flops:.3g}" for kind, flops in self.products.items())
        of = f" weights, products in {self.precision}" if self.precision else ""
        found = [
            f"{self.size} x {device.name} ({device.source}), mesh "
            f"{' x '.join(map(str, self.mesh.values()))} ({' x '.join(self.mesh)}), "
            f"{self.dtype}{of}",
            f"bytes a device: {_amount(self.held)} of {_amount(most)}: {parts}",
            f"FLOPs: {self.flops:.3g} in all ({types}), {self.flops / self.size:.3g} a device, "
            f"{self.intensity:.0f} for each byte of its memory's traffic",
        ]
        for kind, amount in self.kinds().items():
            found.append(f"{kind}: {amount['count']:.0f}, {_amount(amount['bytes'])} a device")
        times = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
        found.append(f"at peak: {times}")
        binds = self.binds(device)
        if binds == "memory":
            short = self.held / most
            binds = f"memory: it takes {short:.2f} times what a device has; use more devices"
        return [*found, f"what binds: {binds}"]


def _amount(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"


def report(made: Callable[[], tuple[Plan, Device]], path: str | pathlib.Path | None) -> None:
    """Print a plan; path: of its figures, too, a .json that is checked before it is made."""
    path = None if path is None else check_writable(path, (".json",))
    found, device = made()
    print("\n".join(found.lines(device)))
    if path is not None:
        write_json(path, found.on(device))
        print(f"figures: {path}")


def check_sizes(options: Any, prefix: str = "") -> None:
    """Raise InputError naming the first number of a dataclass that is too large for a plan.

    Of seeds, which count nothing, none is. Nested ones, too.
    """
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_sizes(value, f"{name}.")
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, int) and one > LARGEST and name != "seed":
                raise InputError(f"{name} must be at most {LARGEST} to be planned, not {one}")


@contextlib.contextmanager
def devices(count: int) -> Iterator[list[Any]]:
    """That many CPU devices, fake but for one, on which programs are compiled.

    In a process whose devices are in use already those must be enough; InputError where they are
    not, or where more are asked for than this can hold.
    """
    if count > _MOST:
        raise InputError(f"a mesh of {count} devices: at most {_MOST} are planned for")
    flag = r"--xla_force_host_platform_device_count=\d+"
    given = os.environ.get("XLA_FLAGS", "")
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
        os.environ["XLA_FLAGS"] = re.sub(flag, "", given)
    except RuntimeError:  # devices are in use
        pass
    found = jax.devices("cpu")
    if len(found) < count:
        raise InputError(
            f"a mesh of {count} devices, but this process has {len(found)} in use: plan in a "
            "process of its own"
        )
    with jax.default_device(found[0]):
        yield found[:count]


def abstract(
    tree: PyTree[Any], where: Callable[[str, tuple[int, ...]], NamedSharding], dtype: Any = None
) -> PyTree[jax.ShapeDtypeStruct]:
    """A tree of shapes as parameters on their shards.

    where: (path, shape) -> sharding, such as `partition.placement` gives. dtype: of all; None:
    each keeps its own.
    """

    def leaf(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=where(name, x.shape))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Rows [B, ...] sharded over data and fsdp."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, shape[0]))


def plan(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    mesh: Mesh,
    dtype: str,
    *,
    weights: tuple[str, ...] = (),
    donated: tuple[str, ...] = (),
    precision: str = "",
    readings: Mapping[str, int] | None = None,
) -> Plan:
    """Compile `function(**arguments)` for a mesh, and read what it takes.

    arguments: trees of `jax.ShapeDtypeStruct` by the name of their kind. weights: those that are
    gathered along fsdp when used. donated: those whose memory results take, in the order of these
    results, as where the function is run. dtype: of weights. precision: as in `Plan`. readings:
    how often products read weights of a name; else once.
    Raises InputError for a program with arrays that XLA cannot count.
    """
    names = tuple(arguments)

    def in_order(*given: Any) -> Any:
        return function(**dict(zip(names, given, strict=True)))

    # JAX takes arguments by name in their alphabet's order, and gives each result the memory of
    # the next donated one that fits: another's, which is then copied before.
    jitted = jax.jit(in_order, donate_argnums=tuple(names.index(name) for name in donated))
    traced = jitted.trace(*arguments.values())
    if found := uncountable(traced.jaxpr):
        raise InputError(f"the program has {found}, which cannot be counted: give smaller sizes")
    work = products(traced.jaxpr)
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        # A CPU casts bfloat16 weights to multiply them: those of a layer, not of all before.
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    }
    compiled = traced.lower().compile(compiler_options=options)
    analysis: Any = compiled.memory_analysis()
    stored = {
        (_whole(x)[-2:]): x.dtype.itemsize
        for name in weights
        for x in jax.tree.leaves(arguments[name])
        if len(x.shape) > 1
    }
    # Each product reads its weights whole along fsdp; the rest of it is spread over all devices.
    times = {name: 1 for name in weights} | dict(readings or {})
    whole = sum(times[name] * math.prod(x.shape) * x.dtype.itemsize for name in weights
                for x in jax.tree.leaves(arguments[name]))  # fmt: skip
    spread = max(work.bytes - whole, 0) / mesh.size
    sizes = {name: shard_bytes(tree) for name, tree in arguments.items()}
    sizes["output"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    sizes["temporaries"] = analysis.temp_size_in_bytes
    return Plan(
        sizes,
        flops_by_type(traced.jaxpr),
        whole / mesh.shape["tensor"] + spread,
        tuple(_as_stored(one, stored) for one in collectives(str(compiled.as_text()))),
        dtype,
        dict(mesh.shape),
        precision,
    )


def _whole(x: Any) -> tuple[int, ...]:
    """What a device holds of an array once it is gathered along fsdp."""
    return whole_along_fsdp(x.sharding).shard_shape(x.shape)


def _as_stored(one: Collective, stored: Mapping[tuple[int, ...], int]) -> Collective:
    """An exchange; where it gathers a matrix of weights, in their dtype.

    stored: bytes of a number of those, by the shape of what is gathered.
    """
    shape = one.shapes[0] if len(one.shapes) == 1 else ()
    if one.kind != "all-gather" or shape[-2:] not in stored or math.prod(shape[:-2]) != 1:
        return one
    size = math.prod(shape) * stored[shape[-2:]]
    return one._replace(sent=one.sent * size / one.size, size=size)
