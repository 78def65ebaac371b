"""Sources of batches of x_0: drawn on the device, inside a compiled loop.

A source is a pytree with `sample(key, count) -> x_0 [count, ...]`, or (x_0, condition), where a
condition is any tree of arrays [count, ...]. Legend: N rows or windows, M time steps of all
episodes, H horizon, D transition width.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from common_jax import struct
from common_jax.checksum import checksum, program_checksum
from common_jax.errors import InputError

__all__ = [
    "Mixed",
    "Rows",
    "Source",
    "Strided",
    "as_source",
    "example",
    "source_checksum",
    "split_batch",
]


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

    Raises InputError for anything else, for arrays that differ in N, and for an x_0 that is no
    array of finite floating numbers.
    """
    if hasattr(batches, "sample"):
        for leaf in jax.tree.leaves(batches):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
                raise InputError(
                    f"{type(batches).__name__} is no pytree of arrays: make the source one, such "
                    "as by common_jax.struct.dataclass"
                )
        return struct.apart(batches)
    if not isinstance(batches, tuple | np.ndarray | jax.Array):
        raise InputError(
            f"{type(batches).__name__} cannot be drawn from: give an array x_0, (x_0, cond) or "
            "a source"
        )
    sizes = sorted({jnp.shape(x)[:1] for x in jax.tree.leaves(batches)})
    if len(sizes) != 1 or (0,) in sizes:
        found = [size[0] if size else "no" for size in sizes]
        raise InputError(f"batches: arrays of one data set have {found} rows")
    if any(isinstance(x, np.ma.MaskedArray) for x in jax.tree.leaves(batches)):
        raise InputError("batches: an array is masked: fill it, or leave its rows out")
    x_0, _ = split_batch(batches)
    if not (fine := jnp.isfinite(x_0).reshape(len(x_0), -1).all(axis=1)).all():
        raise InputError(
            f"batches: {int((~fine).sum())} of {len(x_0)} rows of x_0 hold NaN or infinity, the "
            f"first is row {int(fine.argmin())}: leave them out"
        )
    try:
        return Rows(jax.tree.map(jnp.asarray, batches))
    except (TypeError, ValueError) as error:
        raise InputError(f"batches: a condition is no array of numbers ({error})") from None


def example(source: Source) -> PyTree[Shaped[Array, "2 ..."]]:
    """Two rows, all zeros, like those that are drawn from a source; nothing is drawn."""
    shapes = jax.eval_shape(lambda key: source.sample(key, 2), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def source_checksum(source: Source, count: int, *, many: bool = False) -> str:
    """A checksum of what is drawn from a source. many: its arrays have a leading axis [S]."""

    def draw(source: Any) -> Any:
        return source.sample(jax.random.key(0), count)

    return checksum(
        (program_checksum(jax.vmap(draw) if many else draw, source), jax.tree.leaves(source))
    )


def split_batch(batch: Any) -> tuple[Float[Array, "B ..."], PyTree[Shaped[Array, "B ..."]] | None]:
    """x_0 and its condition, None where it has none.

    Raises InputError for an x_0 that is no array of floating numbers, or has no rows.
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
    if not x_0.ndim or not x_0.size:
        raise InputError(f"x_0 has shape {list(x_0.shape)}: give one row or more, [B, ...]")
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
