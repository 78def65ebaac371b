"""Sources of batches of x_0: drawn on the device, inside a compiled loop.

A source is a pytree with `sample(key, count) -> x_0 [count, ...]`, or (x_0, condition), where a
condition is any tree of arrays [count, ...]. Legend: N rows or windows, M time steps of all
episodes, H horizon, D transition width.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from common_jax.errors import InputError

__all__ = ["Mixed", "Rows", "Source", "Strided", "as_source", "split_batch"]


class Source(Protocol):
    """A pytree that compiled loops draw batches from."""

    def sample(self, key: Key[Array, ""], count: int) -> PyTree[Shaped[Array, "count ..."]]:
        """Rows drawn with replacement, each equally probable."""
        ...


@struct.dataclass
class Rows:
    """An array [N, ...], or a tree of arrays with the same N, such as (x_0, condition)."""

    rows: PyTree[Shaped[Array, "N ..."]]

    def sample(self, key: Key[Array, ""], count: int) -> PyTree[Shaped[Array, "count ..."]]:
        """See `Source`."""
        total = jax.tree.leaves(self.rows)[0].shape[0]
        index = jax.random.randint(key, (count,), 0, total)
        return jax.tree.map(lambda x: x[index], self.rows)


def as_source(batches: Any) -> Any:
    """A source as it is; an array x_0 of N rows, or (x_0, condition), as `Rows`.

    Raises InputError for anything else, and for arrays that differ in N.
    """
    if hasattr(batches, "sample"):
        return batches
    if not isinstance(batches, tuple | np.ndarray | jax.Array):
        raise InputError(
            f"{type(batches).__name__} cannot be drawn from: give an array x_0, (x_0, cond) or "
            "a source"
        )
    rows = jax.tree.map(jnp.asarray, batches)
    if len(sizes := {x.shape[0] for x in jax.tree.leaves(rows)}) != 1 or 0 in sizes:
        raise InputError(f"batches: arrays of one data set have {sorted(sizes)} rows")
    return Rows(rows)


def split_batch(batch: Any) -> tuple[Float[Array, "B ..."], PyTree[Shaped[Array, "B ..."]] | None]:
    """x_0 and its condition, None where it has none.

    Raises InputError for an x_0 that is no array of floating numbers.
    """
    if isinstance(batch, tuple) and len(batch) != 2:
        raise InputError(f"a batch of {len(batch)} parts: give x_0, or (x_0, condition)")
    parts: Any = batch if isinstance(batch, tuple) else (batch, None)
    x_0 = parts[0]
    if not isinstance(x_0, jax.Array | np.ndarray):
        raise InputError(f"x_0 is a {type(x_0).__name__}, not an array [B, ...]")
    if not jnp.issubdtype(x_0.dtype, jnp.floating):
        raise InputError(
            f"x_0 is {x_0.dtype}, not floating numbers: scale it to about -1 .. 1, such as images "
            "to x / 127.5 - 1"
        )
    return parts


@struct.dataclass
class Strided:
    """Windows of a long series: from each start every `stride`-th step, H of them."""

    flat: Float[Array, "M D"]
    starts: Int[Array, " N"]
    horizon: int = struct.field(pytree_node=False)
    stride: int = struct.field(pytree_node=False, default=1)

    def sample(self, key: Key[Array, ""], count: int) -> Float[Array, "count H D"]:
        """See `Source`."""
        starts = self.starts[jax.random.randint(key, (count,), 0, self.starts.shape[0])]
        return self.flat[starts[:, None] + self.stride * jnp.arange(self.horizon)[None]]


@struct.dataclass
class Mixed:
    """Equally many rows from each source; the first gives the remainder, too."""

    sources: tuple[Any, ...]

    def sample(self, key: Key[Array, ""], count: int) -> PyTree[Shaped[Array, "count ..."]]:
        """See `Source`."""
        each = count // len(self.sources)
        counts = [count - each * (len(self.sources) - 1)] + [each] * (len(self.sources) - 1)
        keys = jax.random.split(key, len(counts))
        parts = [s.sample(k, n) for s, k, n in zip(self.sources, keys, counts, strict=True)]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
