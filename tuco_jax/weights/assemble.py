"""Build the parameter tree from the named tensors of a file, one tensor at a time.

A family's key table says where each of our parameters comes from. A tensor that is unknown,
missing, of a wrong shape or not finite is an error that names it. At any moment the host holds, of
one layer of one parameter, what its devices take, and one source tensor (or a block of rows of a
large one), besides what is already on the devices; a CPU device takes over the host's memory
without a copy. Of several processes each reads what its own devices take.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from common_jax.errors import InputError
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, param_shapes
from tuco_jax.weights import int8
from tuco_jax.weights.arrays import (
    Bounds,
    Placement,
    assemble,
    assemble_int8,
    host_array,
    layer_int8,
)

__all__ = [
    "DTYPES",
    "PUBLISHED",
    "Checkpoint",
    "Key",
    "KeyTable",
    "Placement",
    "TensorSource",
    "held_dtype",
    "stored_names",
]

DTYPES = ("float32", "bfloat16", "float16", int8.INT8)
PUBLISHED = "as published"  # bfloat16 where weights are stored so, float32 elsewhere
# Numbers read at a time from a tensor that can be read in rows. Few: dequantised they are held
# several times over, and the allocator may keep that much for good.
_BLOCK = 1 << 19
_STRIP = 16  # rows transposed at a time: one cache line of the destination


class TensorSource(Protocol):
    """A checkpoint: names and shapes without reading, one tensor at a time when asked."""

    name: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, in the orientation that `read` returns."""
        ...

    def file(self, tensor: str) -> str:
        """The file that holds the tensor, for error messages."""
        ...

    def stored(self, tensor: str) -> str:
        """The type that the tensor is stored in: "bfloat16", "Q4_1", ..."""
        ...

    def read(
        self, tensor: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Float[np.ndarray, "..."]:
        """The tensor, or those rows of its first axis; float32, float16 or bfloat16.

        columns: of a matrix, those of its second axis.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Key:
    """Where one parameter comes from: a tensor's name, and how.

    In the name `{l}` stands for the layer and `{e}` for the expert (`stored_names`).

    `transform` turns the tensor that was read into one layer's parameter (transpose, a slice of a
    fused projection, ...). Several keys may read one tensor. `rows` is the parameter's axis along
    which the tensor's rows run, if `transform` works entry by entry: tensors are then read in
    blocks, of the rows and columns that are wanted. None: the tensor is read whole.
    """

    tensor: str
    transform: Callable[[Float[np.ndarray, "..."], ModelConfig], Float[np.ndarray, "..."]] = (
        lambda a, _: a
    )
    rows: Literal[0, 1] | None = None


def stored_names(
    tensor: str, path: str, config: ModelConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every name that a key's `tensor` stands for, and what part of its parameter it holds.

    Outside the layers that is (), all of it; else (layer,), or (layer, expert).
    """
    layers = range(config.depth) if path.startswith("layers/") else (None,)
    experts = range(config.experts) if "{e}" in tensor else (None,)
    for layer, expert in itertools.product(layers, experts):
        at = tuple(i for i in (layer, expert) if i is not None)
        yield tensor.format(l=layer, e=expert), at


KeyTable = Mapping[str, Key]  # our path, such as "layers/attention/q/kernel", to its key


class Checkpoint:
    """A checkpoint that has every tensor that `config` calls for, and no other.

    dtype: of the parameters, one of `DTYPES`, or `PUBLISHED`. ignore: regular expressions (full
    match) of tensors that a checkpoint may hold and that the forward pass does not need. What is
    read is checked: InputError naming the file and the tensor, here for a name, later for shape
    and numbers.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        table: KeyTable,
        *,
        dtype: str,
        ignore: Iterable[str] = (),
    ) -> None:
        if dtype not in (*DTYPES, PUBLISHED):
            raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.config = config
        self._source, self._table, self._dtype = source, table, dtype
        self._stored = source.shapes()
        self._wanted: dict[str, Any] = flatten_dict(param_shapes(config), sep="/")
        _check_names(config, source.name, self._stored, self._wanted, table, tuple(ignore))
        self._check_sizes()

    @property
    def stored(self) -> frozenset[str]:
        """The types that the layers' matrices are stored in."""
        paths = [path for path, spec in self._wanted.items() if len(spec.shape) > 2]
        return frozenset().union(*(self._kinds[path] for path in paths))

    @functools.cached_property
    def _kinds(self) -> dict[str, set[str]]:
        """The types that each parameter's tensors are stored in."""
        return {
            path: {
                self._source.stored(tensor)
                for tensor, _ in stored_names(self._table[path].tensor, path, self.config)
            }
            for path in self._wanted
        }

    def _held(self, path: str) -> str:
        """The dtype that a parameter is held in."""
        return held_dtype(self._dtype, self._kinds[path], path)

    def _check_sizes(self) -> None:
        """Before memory is taken for what a config calls for: each tensor holds as many numbers.

        Its shape is checked when it is read.
        """
        sizes: dict[str, int] = {}
        first: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path, spec in self._wanted.items():
            for tensor, at in stored_names(self._table[path].tensor, path, self.config):
                shape = spec.shape[len(at) :]
                sizes[tensor] = sizes.get(tensor, 0) + math.prod(shape)
                first.setdefault(tensor, (path, shape))
        for tensor, size in sizes.items():
            if math.prod(self._stored[tensor]) != size:
                raise self._misshaped(tensor, *first[tensor])

    def _misshaped(self, tensor: str, path: str, shape: tuple[int, ...]) -> InputError:
        return InputError(
            f"{self._source.file(tensor)}: tensor {tensor} has shape "
            f"{list(self._stored[tensor])}, which does not give {path} the shape {list(shape)} "
            "that the config calls for"
        )

    def read(self, placement: Placement | None = None, *, layers: bool = True) -> Params:
        """Every parameter, layers stacked on axis 0, on devices; or those outside the layers."""
        params = {}
        for path, spec in self._wanted.items():
            stacked = path.startswith("layers/")
            if stacked and not layers:
                continue
            fill, kind = functools.partial(self._fill, path), self._held(path)
            if kind == int8.INT8:
                params |= assemble_int8(path, spec.shape, placement, fill)
                continue
            where = placement(path, spec.shape) if placement else None
            params[path] = assemble(spec.shape, kind, where, fill, layered=stacked)
        return unflatten_dict(params, sep="/")

    def layer(self, index: int) -> Params:
        """One layer's parameters, arrays of the host: what `read` has at `index` of "layers"."""
        params = {}
        for path, spec in self._wanted.items():
            if not path.startswith("layers/"):
                continue
            name, kind = path.removeprefix("layers/"), self._held(path)
            fill = functools.partial(self._fill, path)
            if kind == int8.INT8:
                found = layer_int8(spec.shape, fill, index)
                params[name], params[int8.scale_of(name)] = found
                continue
            params[name] = host_array(spec.shape[1:], kind)
            fill(index, [(tuple((0, size) for size in spec.shape[1:]), params[name])])
        return unflatten_dict(params, sep="/")

    def _fill(self, path: str, layer: int, parts: list[tuple[Bounds, np.ndarray]]) -> None:
        """Read one layer's parameter into parts of it.

        parts: bounds within that layer's parameter, and the array of what is there.
        """
        inside = path.startswith("layers/")
        for tensor, at in stored_names(self._table[path].tensor, path, self.config):
            if inside and at[0] != layer:
                continue
            own = parts
            for index in at[inside:]:  # an expert's
                own = [
                    (bounds[1:], part[index - bounds[0][0]])
                    for bounds, part in own
                    if bounds[0][0] <= index < bounds[0][1]
                ]
            if own:
                self._fill_from(tensor, path, self._wanted[path].shape[len(at) :], own)

    def _fill_from(
        self,
        tensor: str,
        path: str,
        shape: tuple[int, ...],
        parts: list[tuple[Bounds, np.ndarray]],
    ) -> None:
        """Read one tensor, which gives that shape, into parts of it.

        Where the key allows it, in blocks: each is read once for all parts, and what none of them
        holds is not read.
        """
        key, source = self._table[path], self._source
        stored, misshaped = self._stored[tensor], self._misshaped(tensor, path, shape)
        if key.rows is not None and stored != (shape if key.rows == 0 else shape[::-1]):
            raise misshaped
        for box in _boxes(shape, key.rows, [bounds for bounds, _ in parts]):
            along = [slice(*ends) for ends in (box[::-1] if key.rows == 1 else box)]
            value = source.read(tensor, *(() if key.rows is None else along[:2]))
            try:
                value = key.transform(value, self.config)
            except ValueError:  # a fused tensor that does not split as the config says
                raise misshaped from None
            if value.shape != tuple(stop - start for start, stop in box):
                raise misshaped
            for bounds, part in parts:
                there, here = _overlap(bounds, box), _overlap(box, bounds)
                target, own = part[there], value[here]
                with np.errstate(over="ignore"):
                    _copy(target, own)
                if not np.isfinite(target).all():
                    flaw = "holds NaN or infinity"
                    if np.isfinite(own.astype(np.float32)).all():
                        flaw = (
                            f"holds numbers too large for {part.dtype}; load it in another dtype"
                        )
                    raise InputError(f"{source.file(tensor)}: tensor {tensor} {flaw}")


def held_dtype(dtype: str, stored: Iterable[str], path: str = "") -> str:
    """What an array of tensors that are stored in such types is held in; dtype: as asked.

    path: of a parameter, for a dtype that is not for all of them.
    """
    if dtype == int8.INT8 and int8.holds(path):
        return dtype
    if dtype not in (PUBLISHED, int8.INT8):
        return dtype
    return "bfloat16" if set(stored) == {"bfloat16"} else "float32"


def _check_names(
    config: ModelConfig,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, object],
    table: KeyTable,
    ignore: tuple[str, ...],
) -> None:
    expected = set()
    for path in wanted:
        if path not in table:
            raise InputError(f"{name}: family {config.family!r} has no key for {path}")
        expected |= {tensor for tensor, _ in stored_names(table[path].tensor, path, config)}
    missing = sorted(expected - set(shapes))
    unknown = [t for t in sorted(set(shapes) - expected) if not _matches(t, ignore)]
    if missing:
        instead = f"; it holds {unknown[0]}{_and_more(unknown)} instead" if unknown else ""
        raise InputError(
            f"{name}: tensor {missing[0]} is missing{_and_more(missing)}{instead}; "
            "the checkpoint is incomplete, or its config describes another model"
        )
    if unknown:
        raise InputError(
            f"{name}: tensor {unknown[0]} is unknown to family {config.family!r} as its config "
            f"describes it{_and_more(unknown)}"
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _matches(tensor: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(p, tensor) for p in patterns)


def _boxes(shape: tuple[int, ...], rows: int | None, wanted: list[Bounds]) -> Iterator[Bounds]:
    """Bounds of what is read at a time, in a parameter of that shape.

    rows: the axis along which a tensor's rows run; None: all is read as one. Else blocks of rows,
    of about `_BLOCK` numbers, and of a matrix the columns, that the wanted parts lie in.
    """
    whole = tuple((0, size) for size in shape)
    if rows is None:
        yield whole
        return
    spans = [
        (min(start for start, _ in ends), max(stop for _, stop in ends))
        for ends in zip(*wanted, strict=True)
    ]
    box = list(spans if len(shape) == 2 else whole)
    step = max(1, _BLOCK * shape[rows] // max(1, math.prod(shape)))
    for start in range(*spans[rows], step):
        box[rows] = start, min(start + step, spans[rows][1])
        yield tuple(box)


def _overlap(inside: Bounds, other: Bounds) -> tuple[slice, ...]:
    """Where the overlap of two bounds lies, counted from the start of the first."""
    return tuple(
        slice(max(a, c) - a, max(min(b, d), max(a, c)) - a)
        for (a, b), (c, d) in zip(inside, other, strict=True)
    )


def _copy(target: np.ndarray, value: np.ndarray) -> None:
    """target[...] = value, quickly where value is a transposed view."""
    if value.ndim != 2 or value.strides[0] >= value.strides[1]:
        target[...] = value
        return
    for start in range(0, value.shape[1], _STRIP):
        columns = slice(start, start + _STRIP)
        target[:, columns] = value[:, columns]
