"""A checksum of a pair's weights: what stands for them in the settings of a run.

Whether a file, a folder or a hub's model is still what it was when a run began is not told by its
name. Reading every weight once, on the devices that hold it, is: about as long as a sum of them.
"""

import dataclasses
import functools
import hashlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Shaped, UInt32

from tuco_jax.core.layer import PairLayer
from tuco_jax.core.walk import Source, source_of
from tuco_jax.models.pair import Pair

__all__ = ["weights_checksum"]

_BLOCK = 1 << 20  # numbers of a large array that are summed at a time


@dataclasses.dataclass(frozen=True)
class _Leaf:
    shape: tuple[int, ...]
    dtype: str
    checksum: np.uint32


def weights_checksum(pair: Pair | Source) -> str:
    """Of all weights and both configs; 16 hexadecimal digits. A model alone: of `single` of it.

    It does not depend on the source. Layers that stream are each read once for it, and so checked
    before any is used.
    """
    source = source_of(pair)
    ends = source.ends
    trees = {"base": ends.base, "tuned": ends.tuned, "lora": ends.lora}
    flat = flatten_dict(_described(trees)) | _layers(source)
    leaves, structure = jax.tree.flatten({name: {} for name in trees} | unflatten_dict(flat))
    found = hashlib.sha256(repr((ends.base_config, ends.tuned_config)).encode())
    found.update(repr((structure, [(leaf.shape, leaf.dtype) for leaf in leaves])).encode())
    found.update(np.asarray([leaf.checksum for leaf in leaves], np.uint32).tobytes())
    return found.hexdigest()[:16]


def _described(tree: Any) -> Any:
    # One after another: for its sums XLA's CPU backend takes as much memory again.
    return jax.tree.map(lambda x: _Leaf(x.shape, str(x.dtype), _whole_checksum(x)), tree)


def _whole_checksum(x: Shaped[Array, "..."]) -> np.uint32:
    """`_checksum`, of a large array a block of rows at a time, which takes little memory."""
    if x.ndim < 2 or x.size <= _BLOCK or len(x.devices()) > 1:
        return np.uint32(_checksum(x))
    rows = max(1, _BLOCK * len(x) // x.size)
    whole = len(x) - len(x) % rows
    found = sum(int(_block_checksum(x, start, rows)) for start in range(0, whole, rows))
    if whole < len(x):
        found += int(_block_checksum(x, whole, len(x) - whole))
    return np.uint32(found % 2**32)


def _layers(source: Source) -> dict[tuple[str, ...], _Leaf]:
    """Each stacked parameter, by its path, computed from one layer after another."""
    found: dict[tuple[str, ...], _Leaf] = {}
    depth = source.ends.base_config.depth
    # A map, which holds no layer while waiting for the next one.
    for index, described in enumerate(map(_layer, source.layers(0, depth))):
        for (branch, *rest), leaf in described.items():
            path = branch, "layers", *rest
            # As `_checksum` weights the axis of layers, which it sums last.
            own = (2 * index + 1) * int(leaf.checksum)
            own += int(found[path].checksum) if index else 0
            found[path] = _Leaf((depth, *leaf.shape), leaf.dtype, np.uint32(own % 2**32))
    return found


def _layer(layer: PairLayer) -> dict[tuple[str, ...], _Leaf]:
    trees = {"base": layer.params, "tuned": layer.changed, "lora": layer.lora}
    return cast(dict[tuple[str, ...], _Leaf], flatten_dict(_described(trees)))


@jax.jit
def _checksum(x: Shaped[Array, "..."], first: Any = 0) -> UInt32[Array, ""]:
    """A sum of an array's bits, weighted by their place; computed on its own devices.

    first: the place of the first row.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    bits = bits.astype(jnp.uint32)
    while bits.ndim:  # an axis at a time: ten times as fast as one weight for each place
        odd = 2 * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1) + 1
        if bits.ndim == 1:
            odd += 2 * jnp.uint32(first)
        bits = jnp.sum(bits * odd, axis=-1, dtype=jnp.uint32)
    return bits


@functools.partial(jax.jit, static_argnums=2)
def _block_checksum(x: Shaped[Array, "..."], start: int, rows: int) -> UInt32[Array, ""]:
    return _checksum(jax.lax.dynamic_slice_in_dim(x, start, rows), start)
