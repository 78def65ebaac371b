"""Matrix products and soft caps that every layer shares; float32 here means float32.

Legend: n the last axis of x, and of a vector; m rows, E kernels.

Weights may be int8: W = Q s, integers Q and a scale s for each output. Then x W = (x Q) s, and
since bfloat16 holds every such integer, Q stands in products as weights of bfloat16 do.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, Num

from tuco_jax.models.config import Precision

__all__ = ["along_last", "matmul", "product", "ragged_product", "readings", "softcap"]

_PRECISION = jax.lax.Precision.HIGHEST  # no TF32 on GPU, no single bfloat16 pass on TPU
_PARTS: dict[Precision, int] = {"float32": 0, "bfloat16": 1, "bfloat16x2": 2, "bfloat16x3": 3}
_FEW = 64  # rows of x for which reading the kernel is the cost: all parts share one reading


def matmul(x: Float[Array, "... n"], kernel: Float[Array, "... n out"]) -> Float[Array, "... out"]:
    """The product of operands of the kernel's type, accumulated in float32."""
    return jnp.matmul(
        x.astype(kernel.dtype), kernel, precision=_PRECISION, preferred_element_type=jnp.float32
    )


def product(
    x: Float[Array, "... n"],
    kernel: Num[Array, "n out"],
    precision: Precision,
    scale: Float[Array, " out"] | None = None,
) -> Float[Array, "... out"]:
    """X W for weights W as they are held, float32: the one place where weights meet activations.

    "float32": both operands in float32. "bfloat16x3" and "bfloat16x2" cut x into parts,

        x = x_1 + x_2 + x_3,    x_i the rounding to bfloat16 of what the parts before it leave,

    and add the products of each with W in float32: three parts hold all of x (8 bits each of its
    24), two leave a relative error of 2^-16 an element. W must lose nothing in bfloat16; where its
    type is wider than that, such as that of an adapter's factors, it is "float32" all the same.
    "bfloat16": both operands rounded to bfloat16. Derivatives of two and three parts are in
    float32, those of one part in bfloat16 as its product is. scale: of int8 weights.
    """
    y = _taken(x, kernel, None, precision)
    return y if scale is None else y * along_last(scale, y)


def ragged_product(
    x: Float[Array, "m n"],
    kernels: Num[Array, "E n out"],
    sizes: Int[Array, " E"],
    precision: Precision,
    scales: Float[Array, "E out"] | None = None,
) -> Float[Array, "m out"]:
    """`product` of the first sizes[0] rows with the first kernel, of the next with the second."""
    y = _taken(x, kernels, sizes, precision)
    return y if scales is None else y * jnp.repeat(scales, sizes, 0, total_repeat_length=len(x))


def readings(kind: str, precision: Precision, rows: int) -> int:
    """How often `product` of so many rows reads weights of a type: once for each part it takes."""
    parts = _PARTS[precision] if kind in ("bfloat16", "int8") and rows > _FEW else 1
    return max(parts, 1)


def _taken(x: Array, kernel: Array, sizes: Array | None, precision: Precision) -> Array:
    parts = _PARTS[precision]
    if parts == 1:
        return _times(x, kernel.astype(jnp.bfloat16), sizes)
    if parts and kernel.dtype in (jnp.bfloat16, jnp.int8):
        return _by_parts(x, kernel.astype(jnp.bfloat16), sizes, parts)
    return _times(x, kernel.astype(jnp.float32), sizes)


def _times(x: Array, kernel: Array, sizes: Array | None) -> Array:
    """`matmul`; with sizes, those of ragged rows."""
    if sizes is None:
        return matmul(x, kernel)
    return jax.lax.ragged_dot(
        x.astype(kernel.dtype),
        kernel,
        sizes,
        precision=_PRECISION,
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _by_parts(x: Array, kernel: Array, sizes: Array | None, count: int) -> Array:
    left, parts = x.astype(jnp.float32), []
    for _ in range(count):
        part = jax.lax.reduce_precision(left, 8, 7)  # a cast there and back XLA may leave out
        parts.insert(0, part.astype(jnp.bfloat16))  # the smallest is added first
        left -= part
    if sizes is None and math.prod(x.shape[:-1]) <= _FEW:
        return jnp.sum(matmul(jnp.stack(parts), kernel), axis=0)
    return functools.reduce(jnp.add, (_times(part, kernel, sizes) for part in parts))


@functools.partial(_by_parts.defjvp, symbolic_zeros=True)
def _tangent(
    count: int, primals: tuple[Array, Array, Array | None], tangents: Any
) -> tuple[Array, Array]:
    # By parts it would be transposed into products whose results are rounded to bfloat16.
    (x, kernel, sizes), wide = primals, jnp.float32
    moved = [
        _times(a.astype(wide), b.astype(wide), sizes)
        for a, b in ((tangents[0], kernel), (x, tangents[1]))
        if not isinstance(a, SymbolicZero) and not isinstance(b, SymbolicZero)
    ]
    out = _by_parts(x, kernel, sizes, count)
    return out, functools.reduce(jnp.add, moved, jnp.zeros_like(out))


def along_last(vector: Float[Array, " n"], x: Float[Array, "... n"]) -> Float[Array, "*ones n"]:
    """The vector in float32, with as many axes as x, so that it can be added to x or scale it."""
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + vector.shape)


def softcap(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Keep x within (-cap, cap), smoothly: cap tanh(x / cap). A cap of 0 leaves x as it is."""
    return cap * jnp.tanh(x / cap) if cap else x
