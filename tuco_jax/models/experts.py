"""The gated MLPs of a mixture of experts, each at the tokens that it was chosen for, no others.

    form    where                  what it computes
    blocks  CPU; GPU in float32    rows of one expert, a block after another
    ragged  elsewhere              all rows, sorted by expert, in one ragged product

XLA on a CPU, and on a GPU in float32, writes a ragged product out as every expert at every row.

Over a mesh each device sorts and computes the tokens of its own rows (`mixed`): XLA would give all
tokens to every device, since a sort is over all of them.

Legend: B rows, Q tokens of a row, N tokens, U experts used for one, E experts, D residual width, F
MLP width, n rows, b rows of a block.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Num

from common_jax.mesh import batch_sharding, traced_mesh
from common_jax.partition import whole_along_fsdp
from tuco_jax.models import numerics
from tuco_jax.models.config import Precision
from tuco_jax.models.sharding import placement

__all__ = ["Choice", "PerExpert", "by_expert", "mixed"]

# Taking out a block's kernels costs XLA's CPU backend as much as this many rows of the block.
_COPY = 40


class PerExpert(NamedTuple):
    """One linear layer of every expert: kernel [E, in, out], factors [E, in, r], [E, r, out].

    scale: of an int8 kernel.
    """

    kernel: Num[Array, "E inputs outputs"]
    lora: tuple[Float[Array, "E inputs r"], Float[Array, "E r outputs"]] | None
    scale: Float[Array, "E outputs"] | None = None


Layers = Mapping[str, PerExpert]  # gate and up: D -> F; down: F -> D
Activation = Callable[[Float[Array, "n F"]], Float[Array, "n F"]]
# Rows, kernels and, where these are int8, their scales -> rows.
Product = Callable[
    [Float[Array, "n inputs"], Num[Array, "E inputs outputs"], Float[Array, "E outputs"] | None],
    Float[Array, "n outputs"],
]


class Choice(NamedTuple):
    """Which experts a token takes: the `used` of the largest shares. normed: these add up to 1."""

    used: int
    normed: bool

    def of(self, shares: Float[Array, "N E"]) -> tuple[Float[Array, "N U"], Int[Array, "N U"]]:
        """Weights, and the experts that they are of."""
        weights, chosen = jax.lax.top_k(shares, self.used)
        if self.normed:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, chosen


def mixed(
    act: Activation,
    choice: Choice,
    x: Float[Array, "B Q D"],
    shares: Float[Array, "B Q E"],
    layers: Layers,
    precision: Precision = "float32",
) -> Float[Array, "B Q D"]:
    """The weighted sum of each token's experts (`by_expert`); float32.

    shares: a router's, of each expert. In a compiled function over a mesh of `make_mesh`, which
    the types of its arrays tell, each device takes its own rows through experts that are whole
    along fsdp meanwhile; along tensor through its own part of F, and results are summed.
    """

    def own(x: Array, shares: Array, layers: Layers) -> Array:
        weights, chosen = choice.of(shares.reshape(-1, shares.shape[-1]))
        y = by_expert(act, x.reshape(-1, x.shape[-1]), chosen, layers, precision)
        return jnp.sum(y * weights[..., None], axis=1).reshape(x.shape)

    mesh = traced_mesh(x)
    if mesh is None:
        return own(x, shares, layers)
    rows = batch_sharding(mesh, len(x)).spec
    where = placement(mesh)
    held = {name: _held(where, name, layer) for name, layer in layers.items()}
    cut = mesh.shape["tensor"] > 1 and "tensor" in held["down"].kernel

    def part(*given: Any) -> Array:
        return jax.lax.psum(own(*given), "tensor") if cut else own(*given)

    return jax.shard_map(
        part, mesh=mesh, in_specs=(rows, rows, held), out_specs=rows, check_vma=False
    )(x, shares, layers)


def _held(where: Callable[..., NamedSharding], name: str, layer: PerExpert) -> Any:
    """A layer with the axes of its arrays, while they are used, in their place."""

    def spec(leaf: str, array: Array) -> PartitionSpec:
        return whole_along_fsdp(where(f"{name}/{leaf}", array.shape)).spec

    found: Any = spec("kernel", layer.kernel)
    factors: Any = layer.lora and tuple(map(spec, ("a", "b"), layer.lora))
    scale: Any = None if layer.scale is None else spec("scale", layer.scale)
    return PerExpert(found, factors, scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 4))
def by_expert(
    act: Activation,
    x: Float[Array, "N D"],
    chosen: Int[Array, "N U"],
    layers: Layers,
    precision: Precision = "float32",
) -> Float[Array, "N U D"]:
    """down(act(gate x) * up x) of each token, by each expert chosen for it; float32.

    precision: of products (`numerics.product`).

    Differentiable in every mode; its derivatives cannot be mapped over (`jax.vmap`), but it can.
    """

    @jax.custom_batching.custom_vmap
    def run(x: Array, chosen: Array, layers: Layers) -> Array:
        return _by_platform(act, precision, x, chosen, layers, most=False)

    @run.def_vmap
    def mapped(
        size: int, batched: Any, x: Array, chosen: Array, layers: Layers
    ) -> tuple[Array, bool]:
        """All tokens at once, unless there are several sets of experts."""

        def each(a: Array, own: bool) -> Array:
            return a if own else jnp.broadcast_to(a, (size, *a.shape))

        x, chosen = each(x, batched[0]), each(chosen, batched[1])
        if any(jax.tree.leaves(batched[2])):
            layers = jax.tree.map(each, layers, batched[2])
            return jax.lax.map(lambda own: run(*own), (x, chosen, layers)), True
        rows, flat = x.reshape(-1, x.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
        return run(rows, flat, layers).reshape(*chosen.shape, -1), True

    return run(x, chosen, layers)


@by_expert.defjvp
def _tangents(act: Activation, precision: Precision, primals: Any, tangents: Any) -> Any:
    x, chosen, layers = primals

    def plain(x: Array, layers: Layers) -> Array:
        return _by_platform(act, precision, x, chosen, layers, most=True)

    _, moved = jax.jvp(plain, (x, layers), tangents[::2])
    return by_expert(act, *primals, precision), moved


def _by_platform(
    act: Activation,
    precision: Precision,
    x: Array,
    chosen: Array,
    layers: Layers,
    *,
    most: bool,
) -> Float[Array, "N U D"]:
    # Each form is recomputed when differentiated: what one would save for its derivative, every
    # other would have to hold, as zeros, on its own platform.
    blocks = jax.checkpoint(functools.partial(_blocks, act, precision, most))
    ragged = jax.checkpoint(functools.partial(_ragged, act, precision))
    forms = {"cpu": blocks, "default": ragged}
    if precision == "float32" or layers["gate"].kernel.dtype == jnp.float32:
        forms["cuda"] = blocks
    return jax.lax.platform_dependent(x, chosen, layers, **forms)


def _gated(
    act: Activation, product: Product, x: Float[Array, "n D"], layers: Layers
) -> Float[Array, "n D"]:
    def linear(x: Array, name: str) -> Array:
        layer = layers[name]
        y = product(x, layer.kernel, layer.scale)
        if layer.lora is not None:
            a, b = layer.lora
            y += product(product(x, a, None), b, None)
        return y

    return linear(act(linear(x, "gate")) * linear(x, "up"), "down")


def _sorted(
    chosen: Int[Array, "N U"], experts: int
) -> tuple[Int[Array, " n"], Int[Array, " n"], Int[Array, " E"]]:
    """Sorted by expert: which of the n = N U choices stands where, and where each one; counts."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size), unique_indices=True)
    return order, place, jnp.zeros(experts, jnp.int32).at[flat].add(1)


def _ragged(
    act: Activation,
    precision: Precision,
    x: Float[Array, "N D"],
    chosen: Int[Array, "N U"],
    layers: Layers,
) -> Float[Array, "N U D"]:
    order, place, sizes = _sorted(chosen, len(layers["gate"].kernel))

    def product(rows: Array, kernel: Array, scale: Array | None) -> Array:
        return numerics.ragged_product(rows, kernel, sizes, precision, scale)

    out = _gated(act, product, x[order // chosen.shape[1]], layers)
    return out[place].reshape(*chosen.shape, -1)


def _blocks(
    act: Activation,
    precision: Precision,
    most: bool,
    x: Float[Array, "N D"],
    chosen: Int[Array, "N U"],
    layers: Layers,
) -> Float[Array, "N U D"]:
    """Blocks of sorted rows, each of which begins with rows of one expert.

    If it ends with others', these are wrong, until the blocks of those experts overwrite them.
    most: go through as many blocks as there may be, not as the choices need: then derivatives
    can be taken. Those too many write beyond the last row.
    """
    experts, count = len(layers["gate"].kernel), chosen.size
    order, place, sizes = _sorted(chosen, experts)
    # The least of copies and of rows for nothing, where experts are used alike.
    block = min(count, math.ceil(math.sqrt(2 * _COPY * count / experts)))
    needed = -(-sizes // block)
    ends, first = jnp.cumsum(needed), jnp.cumsum(sizes) - sizes

    @jax.checkpoint  # or the kernels of every block would be kept for the derivative
    def one(expert: Array, start: Array) -> Array:
        def product(rows: Array, *weights: Array | None) -> Array:
            kernel, scale = jax.tree.map(
                lambda a: jax.lax.dynamic_index_in_dim(a, expert, keepdims=False), weights
            )
            return numerics.product(rows, kernel, precision, scale)

        at = jnp.minimum(start + jnp.arange(block), count - 1)
        return _gated(act, product, x[order[at] // chosen.shape[1]], layers)

    def visit(number: Array, out: Array) -> Array:
        expert = jnp.minimum(jnp.searchsorted(ends, number, side="right"), experts - 1)
        start = first[expert] + (number - (ends - needed)[expert]) * block
        return jax.lax.dynamic_update_slice_in_dim(out, one(expert, start), start, axis=0)

    stop = min(count, count // block + experts) if most else ends[-1]
    out = jnp.zeros((count + block, x.shape[1]), jnp.float32)
    out = jax.lax.fori_loop(0, stop, visit, out)
    return out[place].reshape(*chosen.shape, -1)
