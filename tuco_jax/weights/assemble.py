"""Build the parameter tree from the named tensors of a file, one tensor at a time.

A family's key table says where each of our parameters comes from. A tensor that is unknown,
missing, of a wrong shape or not finite is an error that names it. At any moment the host holds one
stacked parameter and one source tensor (or a block of rows of a large one), besides what is
already on the devices; a CPU device takes over the host's memory without a copy.
"""

import dataclasses
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
from tuco_jax.weights.arrays import Placement, host_array, place

__all__ = ["DTYPES", "Checkpoint", "Key", "KeyTable", "Placement", "TensorSource", "stored_names"]

DTYPES = ("float32", "bfloat16", "float16")
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

    def read(self, tensor: str, rows: slice = slice(None)) -> Float[np.ndarray, "..."]:
        """The tensor, or those rows of its first axis; float32, float16 or bfloat16."""
        ...


@dataclasses.dataclass(frozen=True)
class Key:
    """Where one parameter comes from: a tensor's name, and how.

    In the name `{l}` stands for the layer and `{e}` for the expert (`stored_names`).

    `transform` turns the tensor that was read into one layer's parameter (transpose, a slice of a
    fused projection, ...). Several keys may read one tensor. `rows` is the parameter's axis along
    which the tensor's rows run, if `transform` works row by row: large tensors are then read in
    blocks. None: the tensor is read whole.
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

    dtype: of the parameters, one of `DTYPES`. ignore: regular expressions (full match) of tensors
    that a checkpoint may hold and that the forward pass does not need. What is read is checked:
    InputError naming the file and the tensor, here for a name, later for shape and numbers.
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
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.config = config
        self._source, self._table, self._dtype = source, table, dtype
        self._stored = source.shapes()
        self._wanted: dict[str, Any] = flatten_dict(param_shapes(config), sep="/")
        _check_names(config, source.name, self._stored, self._wanted, table, tuple(ignore))
        self._check_sizes()

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
            host = host_array(spec.shape, self._dtype)
            for tensor, at in stored_names(self._table[path].tensor, path, self.config):
                self._fill(host[at], path, tensor)
            where = placement(path, spec.shape) if placement else None
            params[path] = place(host, where)
        return unflatten_dict(params, sep="/")

    def layer(self, index: int) -> Params:
        """One layer's parameters, arrays of the host: what `read` has at `index` of "layers"."""
        params = {}
        for path, spec in self._wanted.items():
            if path.startswith("layers/"):
                host = host_array(spec.shape[1:], self._dtype)
                for tensor, at in stored_names(self._table[path].tensor, path, self.config):
                    if at[0] == index:
                        self._fill(host[at[1:]], path, tensor)
                params[path.removeprefix("layers/")] = host
        return unflatten_dict(params, sep="/")

    def _fill(self, target: np.ndarray, path: str, tensor: str) -> None:
        """Read one tensor into its part of a parameter, in blocks where the key allows it."""
        key, source = self._table[path], self._source
        shape = self._stored[tensor]
        misshaped = self._misshaped(tensor, path, target.shape)
        if key.rows is not None and shape != (target.shape if key.rows == 0 else target.T.shape):
            raise misshaped
        for rows in _blocks(shape) if key.rows is not None else (slice(None),):
            value = source.read(tensor, rows)
            try:
                value = key.transform(value, self.config)
            except ValueError:  # a fused tensor that does not split as the config says
                raise misshaped from None
            part = target if key.rows is None else target[(slice(None),) * key.rows + (rows,)]
            if value.shape != part.shape:
                raise misshaped
            with np.errstate(over="ignore"):
                _copy(part, value)
            if not np.isfinite(part).all():
                flaw = "holds NaN or infinity"
                if np.isfinite(value.astype(np.float32)).all():
                    flaw = f"holds numbers too large for {part.dtype}; load it in another dtype"
                raise InputError(f"{source.file(tensor)}: tensor {tensor} {flaw}")


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


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis, of about `_BLOCK` numbers each."""
    step = max(1, _BLOCK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _copy(target: np.ndarray, value: np.ndarray) -> None:
    """target[...] = value, quickly where value is a transposed view."""
    if value.ndim != 2 or value.flags.c_contiguous:
        target[...] = value
        return
    for start in range(0, value.shape[1], _STRIP):
        columns = slice(start, start + _STRIP)
        target[:, columns] = value[:, columns]
