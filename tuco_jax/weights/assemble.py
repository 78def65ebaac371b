"""From named tensors in a file to the stacked parameter tree, one tensor at a time.

A family's key table says where each of our parameters comes from. The importer is loud: a tensor
that is unknown, missing, misshaped or not finite is an error that names it. At any moment the host
holds one stacked parameter and one source tensor beside what is already on the devices.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from common_jax.errors import InputError
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, param_shapes

__all__ = ["Key", "KeyTable", "Placement", "TensorSource", "assemble"]


class TensorSource(Protocol):
    """A checkpoint: names and shapes without reading, one tensor at a time when asked."""

    name: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, in the orientation that `read` returns."""
        ...

    def read(self, tensor: str) -> np.ndarray:
        """The tensor, float32, float16 or bfloat16."""
        ...


@dataclasses.dataclass(frozen=True)
class Key:
    """Where one parameter comes from: a tensor's name, `{l}` standing for the layer, and how.

    `transform` turns the tensor that was read into one layer's parameter (transpose, a slice of a
    fused projection, ...). Several keys may read one tensor.
    """

    tensor: str
    transform: Callable[[np.ndarray, ModelConfig], np.ndarray] = lambda a, _: a


KeyTable = Mapping[str, Key]  # our path, such as "layers/attention/q/kernel", to its key

# Where a stacked parameter goes: (path, shape) -> a sharding, or None for the default device.
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


def assemble(
    config: ModelConfig,
    source: TensorSource,
    table: KeyTable,
    *,
    dtype: str,
    ignore: Iterable[str] = (),
    placement: Placement | None = None,
) -> Params:
    """Read every parameter that `config` calls for, stack layers on axis 0, put it on devices.

    ignore: regular expressions (full match) of tensors that a checkpoint may hold and that the
    forward pass does not need. Raises InputError naming the tensor.
    """
    shapes = source.shapes()
    wanted = flatten_dict(param_shapes(config), sep="/")
    _check_names(config, source.name, shapes, wanted, table, tuple(ignore))
    params = {}
    for path, spec in wanted.items():
        params[path] = _parameter(config, source, path, spec.shape, table[path], dtype, placement)
    return unflatten_dict(params, sep="/")


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
        expected |= {tensor for tensor in _tensors(config, path, table[path])}
    missing = sorted(expected - set(shapes))
    if missing:
        raise InputError(f"{name}: tensor {missing[0]} is missing{_and_more(missing)}")
    unknown = [t for t in sorted(set(shapes) - expected) if not _matches(t, ignore)]
    if unknown:
        raise InputError(
            f"{name}: tensor {unknown[0]} is unknown to family {config.family!r}"
            f"{_and_more(unknown)}"
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _matches(tensor: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(p, tensor) for p in patterns)


def _tensors(config: ModelConfig, path: str, key: Key) -> list[str]:
    """The source tensors of one parameter: one a layer, or one."""
    if path.startswith("layers/"):
        return [key.tensor.format(l=layer) for layer in range(config.depth)]
    return [key.tensor]


def _parameter(
    config: ModelConfig,
    source: TensorSource,
    path: str,
    shape: tuple[int, ...],
    key: Key,
    dtype: str,
    placement: Placement | None,
) -> jax.Array:
    stacked = path.startswith("layers/")
    host = np.empty(shape, jax.numpy.dtype(dtype))
    for layer, tensor in enumerate(_tensors(config, path, key)):
        value = key.transform(source.read(tensor), config)
        target = shape[1:] if stacked else shape
        if value.shape != target:
            raise InputError(
                f"{source.name}: tensor {tensor} gives shape {list(value.shape)} for {path}, "
                f"but the config calls for {list(target)}"
            )
        if not np.isfinite(value.astype(np.float32, copy=False)).all():
            raise InputError(f"{source.name}: tensor {tensor} holds NaN or infinity")
        if stacked:
            host[layer] = value
        else:
            host[...] = value
    sharding = placement(path, shape) if placement else None
    return jax.device_put(host, sharding)
