"""Which axis of which parameter of a denoiser or a reward is sharded over which axis of a mesh.

Kernels, [inputs, outputs] of a dense layer and [taps, inputs, outputs] of a convolution, are
sharded by outputs over "tensor", and the second layer of a block by inputs; the other side over
"fsdp", gathered when used. Averages and moments lie as their parameters do. Biases and norms are
whole on every device.
"""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from common_jax import partition
from common_jax.mesh import traced_mesh
from common_jax.partition import Rules

__all__ = ["RULES", "gathered", "in_use", "keep", "place", "placement"]

# See `common_jax/partition.py`.
RULES: Rules = (
    (r"second(_\d+)?(/conv)?/kernel", PartitionSpec("tensor", "fsdp")),
    (r"kernel", PartitionSpec("fsdp", "tensor")),
)


def place(tree: PyTree[Any], mesh: Mesh | None) -> PyTree[Shaped[Array, "..."]]:
    """`partition.place` by these rules, of a model or a training's state."""
    return partition.place(tree, RULES, mesh)


def placement(mesh: Mesh | None) -> Callable[[str, tuple[int, ...]], NamedSharding | None]:
    """`partition.placement` by these rules; without a mesh None for all, the default device."""
    return (lambda path, shape: None) if mesh is None else partition.placement(RULES, mesh)


def keep(tree: PyTree[Any], mesh: Mesh | None) -> PyTree[Shaped[Array, "..."]]:
    """`partition.keep` by these rules."""
    return partition.keep(tree, RULES, mesh)


def gathered(tree: PyTree[Any], mesh: Mesh | None) -> PyTree[Shaped[Array, "..."]]:
    """`partition.gathered` by these rules."""
    return partition.gathered(tree, RULES, mesh)


def in_use(tree: PyTree[Any]) -> PyTree[Shaped[Array, "..."]]:
    """`gathered`, over the mesh that the types of a model's own parameters tell."""
    return gathered(tree, traced_mesh(tree))
