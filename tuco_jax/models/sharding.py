"""Which axis of which parameter is sharded over which axis of the mesh.

A mesh is `common_jax.mesh.make_mesh`'s: data, fsdp, tensor. Matrices that read the residual stream
(q, k, v, gate, up, head) are sharded by columns over "tensor", those that write to it (o, down) by
rows, so that a block sums over devices twice; the other side of each is sharded over "fsdp" and
gathered when used. So is each expert's of a mixture. Layers (axis 0) are never sharded: the scan
runs over them.

Legend: B batch, T tokens, N rows of a table, D its columns.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree, Shaped

from common_jax import partition
from common_jax.mesh import AXES, batch_sharding, put
from common_jax.partition import Rules

__all__ = [
    "RULES",
    "batch_width",
    "gathered",
    "looked_up",
    "mesh_of",
    "place",
    "placement",
    "put_rows",
    "shardings",
]

# See `common_jax/partition.py`.
RULES: Rules = (
    (r"embed/table", PartitionSpec("tensor", "fsdp")),
    (r"positions/table", PartitionSpec(None, "fsdp")),
    (r"(q|k|v|gate|up|head)/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(q|k|v|gate|up|head)/(bias|scale)", PartitionSpec("tensor")),
    (r"router/(kernel|a)", PartitionSpec("fsdp", None)),
    (r"(q|k|v|gate|up|head)/a", PartitionSpec("fsdp", None)),
    (r"(q|k|v|gate|up|head)/b", PartitionSpec(None, "tensor")),
    (r"(o|down)/kernel", PartitionSpec("tensor", "fsdp")),
    (r"(o|down)/scale", PartitionSpec("fsdp")),
    (r"(o|down)/a", PartitionSpec("tensor", None)),
    (r"(o|down)/b", PartitionSpec(None, "fsdp")),
)


def placement(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(path, shape) -> where that parameter of a decoder, or of a pair, lies on `mesh`."""
    return partition.placement(RULES, mesh)


def gathered(
    path: str, parameter: Shaped[Array, "..."], mesh: Mesh | None
) -> Shaped[Array, "..."]:
    """A parameter whole along fsdp, as a matrix is while it is used; along tensor as it lies."""
    return partition.gathered({path: parameter}, RULES, mesh)[path]


def looked_up(
    path: str,
    table: Float[Array, "N D"],
    index: Int[Array, "B T"],
    mesh: Mesh | None,
) -> Float[Array, "B T D"]:
    """Rows of a table, float32, of which no device is given another's part.

    Each looks up, in its own columns of its own rows, what all devices along fsdp ask for. These
    exchange columns for the batch's rows; along tensor, where one device has a row and the others
    have zeros, they add up. (The compiler would copy the table, or what is looked up, to all.)
    """
    if mesh is None:
        return table[index].astype(jnp.float32)
    spec = placement(mesh)(path, table.shape).spec
    by_row, by_column = (axis if axis and mesh.shape[axis] > 1 else None for axis in spec)
    rows = batch_sharding(mesh, len(index)).spec
    cut = len(index) % batch_width(mesh) == 0  # else devices along fsdp have the same rows

    def own(table: Float[Array, "n d"], index: Int[Array, "b T"]) -> Float[Array, "b T D"]:
        if by_column and cut:
            index = jax.lax.all_gather(index, by_column, axis=0, tiled=True)
        if by_row:
            index -= jax.lax.axis_index(by_row) * len(table)
            here = (index >= 0) & (index < len(table))
            x = jnp.where(here[..., None], table[jnp.where(here, index, 0)], 0)
        else:
            x = table[index]
        if by_column and cut:
            x = jax.lax.all_to_all(x, by_column, split_axis=0, concat_axis=2, tiled=True)
        elif by_column:
            x = jax.lax.all_gather(x, by_column, axis=2, tiled=True)
        x = x.astype(jnp.float32)
        return jax.lax.psum(x, by_row) if by_row else x

    held = PartitionSpec(by_row, by_column)
    return jax.shard_map(own, mesh=mesh, in_specs=(held, rows), out_specs=rows, check_vma=False)(
        table, index
    )


def shardings(tree: PyTree[Any], mesh: Mesh) -> PyTree[NamedSharding]:
    """The sharding of every leaf of a tree of parameters (or of `jax.ShapeDtypeStruct`)."""
    return partition.shardings(tree, RULES, mesh)


def place(tree: PyTree[Shaped[Array, "..."]], mesh: Mesh) -> PyTree[Shaped[Array, "..."]]:
    """A tree of parameters, such as a `Pair`, moved to its shards."""
    return partition.place(tree, RULES, mesh)


def batch_width(mesh: Mesh | None) -> int:
    """How many shards a batch has: a number of rows that it divides leaves no device idle."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in AXES[:2])


def put_rows(rows: PyTree[Any], mesh: Mesh | None) -> PyTree[Any]:
    """A tree of arrays [B, ...], sharded over data and fsdp; without a mesh as they are."""
    if mesh is None:
        return rows
    return jax.tree.map(lambda x: put(x, batch_sharding(mesh, x.shape[0])), rows)


def mesh_of(tree: PyTree[Any]) -> Mesh | None:
    """The mesh of `make_mesh` that a tree's arrays are spread over; None on one device."""
    for leaf in jax.tree.leaves(tree):
        where = getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
            if where.mesh.size > 1 and where.mesh.axis_names == AXES:
                return where.mesh
    return None
