"""Matrix products and soft caps that every layer shares; float32 here means float32.

Legend: n the last axis of x, and of a vector; m rows, E kernels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["along_last", "matmul", "ragged_matmul", "softcap"]

_PRECISION = jax.lax.Precision.HIGHEST  # no TF32 on GPU, no single bfloat16 pass on TPU


def matmul(x: Float[Array, "... n"], kernel: Float[Array, "... n out"]) -> Float[Array, "... out"]:
    """The product of operands of the kernel's type, accumulated in float32."""
    return jnp.matmul(
        x.astype(kernel.dtype), kernel, precision=_PRECISION, preferred_element_type=jnp.float32
    )


def ragged_matmul(
    x: Float[Array, "m n"], kernels: Float[Array, "E n out"], sizes: Int[Array, " E"]
) -> Float[Array, "m out"]:
    """`matmul` of the first sizes[0] rows with the first kernel, of the next with the second."""
    return jax.lax.ragged_dot(
        x.astype(kernels.dtype),
        kernels,
        sizes,
        precision=_PRECISION,
        preferred_element_type=jnp.float32,
    )


def along_last(vector: Float[Array, " n"], x: Float[Array, "... n"]) -> Float[Array, "*ones n"]:
    """The vector in float32, with as many axes as x, so that it can be added to x or scale it."""
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + vector.shape)


def softcap(x: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Keep x within (-cap, cap), smoothly: cap tanh(x / cap). A cap of 0 leaves x as it is."""
    return cap * jnp.tanh(x / cap) if cap else x
