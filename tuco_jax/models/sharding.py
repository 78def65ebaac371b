"""Which axis of which parameter is sharded over which axis of the mesh.

A mesh is `common_jax.mesh.make_mesh`'s: data, fsdp, tensor. Matrices that read the residual stream
(q, k, v, gate, up, head) are sharded by columns over "tensor", those that write to it (o, down) by
rows, so that a block sums over devices twice; the other side of each is sharded over "fsdp" and
gathered when used. So is each expert's of a mixture. Layers (axis 0) are never sharded: the scan
runs over them.

Legend: B batch.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from common_jax import partition
from common_jax.mesh import AXES, batch_sharding, put
from common_jax.partition import Rules

__all__ = [
    "RULES",
    "batch_width",
    "gathered",
    "mesh_of",
    "place",
    "placement",
    "put_rows",
    "shardings",
    "traced_mesh",
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
    """A parameter whole along fsdp, as a matrix is while it is used; along tensor as it lies.

    The compiler does so by itself for products, but not for lookups in a table: rows that are cut
    by fsdp would be made, and cut anew by the batch's rows, for which it copies them all.
    """
    return partition.gathered({path: parameter}, RULES, mesh)[path]


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


def traced_mesh(x: Shaped[Array, "..."]) -> Any:
    """In a compiled function, the mesh of `make_mesh` that an array's type tells; else None."""
    mesh = jax.typeof(x).sharding.mesh
    auto = all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if mesh.axis_names == AXES and auto else None


def mesh_of(tree: PyTree[Any]) -> Mesh | None:
    """The mesh of `make_mesh` that a tree's arrays are spread over; None on one device."""
    for leaf in jax.tree.leaves(tree):
        where = getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh):
            if where.mesh.size > 1 and where.mesh.axis_names == AXES:
                return where.mesh
    return None
