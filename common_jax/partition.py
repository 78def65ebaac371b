"""Rules for where parameters lie on a mesh, as data: a pattern of paths -> axes of the mesh.

Each package keeps a table of rules beside its models; this is what reads them. A rule's
`PartitionSpec` is of a parameter's last axes, so that layers or seeds that are stacked in front
change nothing. An axis whose size the mesh's does not divide stays whole, and so does every
parameter that no rule names.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from common_jax.mesh import put

__all__ = ["Rules", "gathered", "keep", "place", "placement", "shardings", "whole_along_fsdp"]

# (regular expression of the end of a path, axes of the mesh); the first that matches counts.
Rules = Sequence[tuple[str, PartitionSpec]]


def placement(rules: Rules, mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(path, shape) -> where that parameter lies on `mesh`.

    A path is "layers/attention/q/kernel", with or without a prefix such as "tuned" or "0/mu": so
    pairs, gradients, averages and optimizer states follow the rules of their parameters.
    """

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        for pattern, spec in rules:
            if len(shape) >= len(spec) and re.search(rf"(^|/)({pattern})$", path):
                axes = (None,) * (len(shape) - len(spec)) + tuple(spec)
                fits = (
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(axes, shape, strict=True)
                )
                return NamedSharding(mesh, PartitionSpec(*fits))
        return NamedSharding(mesh, PartitionSpec())

    return sharding


def shardings(tree: PyTree[Any], rules: Rules, mesh: Mesh) -> PyTree[NamedSharding]:
    """The sharding of every leaf of a tree of parameters (or of `jax.ShapeDtypeStruct`)."""
    where = placement(rules, mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: where(_name(path), np.shape(x)),
        tree,
    )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def place(
    tree: PyTree[Shaped[Array, "..."]], rules: Rules, mesh: Mesh | None
) -> PyTree[Shaped[Array, "..."]]:
    """A tree of parameters moved to its shards; without a mesh as it is."""
    return tree if mesh is None else put(tree, shardings(tree, rules, mesh))


def keep(
    tree: PyTree[Shaped[Array, "..."]], rules: Rules, mesh: Mesh | None
) -> PyTree[Shaped[Array, "..."]]:
    """In a compiled function: a tree where `place` puts it; without a mesh as it is.

    Else the compiler may move what one call hands to the next, which would compile anew.
    """
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(tree, rules, mesh))


def gathered(
    tree: PyTree[Shaped[Array, "..."]], rules: Rules, mesh: Mesh | None
) -> PyTree[Shaped[Array, "..."]]:
    """In a compiled function: a tree whole along fsdp, as parameters are while they are used.

    Along tensor it stays as it lies. The compiler need not gather weights by itself: it may move
    activations instead.
    """
    if mesh is None:
        return tree
    where = jax.tree.map(whole_along_fsdp, shardings(tree, rules, mesh))
    return jax.lax.with_sharding_constraint(tree, where)


def whole_along_fsdp(where: NamedSharding) -> NamedSharding:
    """The sharding of a parameter while it is used, of that in which it lies."""
    axes = (None if axis == "fsdp" else axis for axis in where.spec)
    return NamedSharding(where.mesh, PartitionSpec(*axes))
