"""What a program costs, read from it without running it: products, and what devices exchange."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

__all__ = [
    "LARGEST",
    "Collective",
    "Products",
    "collectives",
    "each_product",
    "flops_by_type",
    "products",
    "shard_bytes",
    "uncountable",
]

LARGEST = 2**31 - 1  # of an axis: XLA ends the process where one is larger


class Products(NamedTuple):
    """FLOPs (a multiplication and an addition are two) and bytes of operands and results."""

    flops: float = 0
    bytes: float = 0


def products(program: Any) -> Products:
    """All matrix products and convolutions of a program (`jax.make_jaxpr`), those of loops too."""
    total = Products()
    for equation, times in each_product(program):
        one = _cost(equation)
        total = Products(total.flops + times * one.flops, total.bytes + times * one.bytes)
    return total


def flops_by_type(program: Any) -> dict[str, float]:
    """FLOPs of `products` by the type of operands, the wider of two: "bfloat16", "float32", ..."""
    found: dict[str, float] = {}
    for equation, times in each_product(program):
        kinds = [x.aval.dtype for x in equation.invars[:2]]
        kind = str(max(kinds, key=lambda kind: kind.itemsize))
        found[kind] = found.get(kind, 0.0) + times * _cost(equation).flops
    return found


def each_product(program: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """The equations of a program's products and convolutions, and how often each is computed.

    Of a loop whose length is not known one round counts, of a branch the dearest.
    """
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in _PRODUCTS:
            yield equation, times
            continue
        inside = list(_programs(params))
        if name == "cond":
            inside = [max(inside, key=products)]
        for part in inside:
            yield from each_product(part, times * (params["length"] if name == "scan" else 1))


_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def _cost(equation: Any) -> Products:
    name, params = equation.primitive.name, equation.params
    left, right = (x.aval for x in equation.invars[:2])
    out = equation.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(left.shape[axis] for axis in contracted)
    elif name == "ragged_dot_general":  # each row is multiplied by one matrix
        inner = left.shape[-1]
    else:  # [.., out, ..]: each output sums over all else of the kernel
        features = params["dimension_numbers"].rhs_spec[0]
        inner = math.prod(right.shape) // right.shape[features]
    moved = sum(x.size * x.dtype.itemsize for x in (left, right, out))
    return Products(2.0 * out.size * inner, moved)


def uncountable(program: Any) -> str | None:
    """The first array of a program that XLA cannot count, in words; None where it counts all.

    An axis has at most LARGEST numbers, also one that a product's axes of one kind are made into;
    an array fewer than 2^60 numbers, which are 2^63 bytes at most.
    """
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    for equation in jaxpr.eqns:
        for x in (*equation.invars, *equation.outvars):
            shape = getattr(x.aval, "shape", ())
            size = math.prod(shape) * 8
            if max(shape, default=0) > LARGEST or size >= 2**63:
                return f"an array of {' x '.join(map(str, shape))} numbers"
        if equation.primitive.name in _PRODUCTS and max(_merged(equation)) > LARGEST:
            shapes = (" x ".join(map(str, x.aval.shape)) for x in equation.invars[:2])
            return f"a product of {' and '.join(shapes)} numbers"
        for part in _programs(equation.params):
            if found := uncountable(part):
                return found
    return None


def _merged(equation: Any) -> list[int]:
    """Lengths of a product's axes once those of one kind are one, as XLA makes them."""
    params = equation.params
    left, right = (x.aval.shape for x in equation.invars[:2])
    if equation.primitive.name == "ragged_dot_general":
        return [*left, *right]
    if equation.primitive.name == "conv_general_dilated":
        rows, _, *places = params["dimension_numbers"].lhs_spec
        return [math.prod(left[axis] for axis in (rows, *places))]
    (inner, inner_right), (batch, batch_right) = params["dimension_numbers"]
    free = set(range(len(left))) - {*inner, *batch}
    free_right = set(range(len(right))) - {*inner_right, *batch_right}
    kinds = (left, inner), (left, batch), (left, free), (right, free_right)
    return [math.prod(shape[axis] for axis in axes) for shape, axes in kinds]


def _programs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield part


class Collective(NamedTuple):
    """One kind of exchange, of a compiled program.

    kind: "all-gather", "all-reduce", ... shapes: of its results on one device. times: how often it
    runs. sent: bytes that a device sends each time, along a ring. size: bytes of its results.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    times: int
    sent: float
    size: int = 0


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")
_LAYOUT = re.compile(r"\{.*?\}")
_PART = re.compile(r"\([^()]*\)|\w+\[[\d,]*\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# {{0,1},{2,3}}, or [groups,size]<=..., or mesh['a'=2,'b'=4] ... {'b'}: along those axes.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_AXES = re.compile(r"replica_groups=(?:mesh|@\w+)\[([^\]]*)\][^{]*\{([^}]*)\}")


def collectives(text: str) -> list[Collective]:
    """Every exchange between devices in a compiled program's text, those of loops counted."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return list(_walk(bodies, entry, 1))


def _walk(bodies: Mapping[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in bodies.get(name, ()):
        found = _LINE.match(line)
        if not found:
            continue
        kind = found[2].removesuffix("-start")
        if kind in _KINDS:
            # What begins an all-reduce states its results alone, as what is not asynchronous does.
            begins = found[2] != kind != "all-reduce"
            yield _exchange(kind, _results(found[1]) if begins else found[1], line, times)
            continue
        rounds = _rounds(bodies, line) if found[2] == "while" else 1
        called = _CALLED.findall(line)
        for some in _BRANCHES.findall(line):
            called += re.findall(r"[\w.\-]+", some)
        for inner in called:
            yield from _walk(bodies, inner, times * rounds)


def _rounds(bodies: Mapping[str, list[str]], line: str) -> int:
    """How often a loop's body runs: as stated, or up to the one number of its condition (TPUs)."""
    if trips := _TRIPS.search(line):
        return int(trips[1])
    condition = _CONDITION.search(line)
    text = "\n".join(bodies.get(condition[1], ())) if condition else ""
    bounds = _BOUND.findall(text)
    return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in text else 1


def _results(begun: str) -> str:
    """The second part of (operands, results, contexts...), each an array or a tuple of them."""
    return _PART.findall(_LAYOUT.sub("", begun)[1:-1])[1]


def _exchange(kind: str, result: str, line: str, times: int) -> Collective:
    arrays = [(dtype, _axes(axes)) for dtype, axes in _ARRAY.findall(result)]
    size = sum(_BYTES.get(dtype, 4) * math.prod(axes) for dtype, axes in arrays)
    count = _together(line)
    share = (count - 1) / count
    sent = {"all-reduce": 2 * share, "reduce-scatter": count - 1.0, "collective-permute": 1.0}
    shapes = tuple(axes for _, axes in arrays)
    return Collective(kind, shapes, times, size * sent.get(kind, share), size)


def _together(line: str) -> int:
    """How many devices take part in one exchange."""
    if found := _LISTED.search(line):
        return len(found[1].split(","))
    if found := _COUNTED.search(line):
        return int(found[1])
    if found := _AXES.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 2  # two at a time, as of a permutation


def _axes(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",") if x)


def shard_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of arrays, or of `jax.ShapeDtypeStruct` with shardings."""

    def of(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(of(x) for x in jax.tree.leaves(tree))
