"""Products and squashes that every layer shares: where float32 means float32."""

import jax
import jax.numpy as jnp

__all__ = ["along_last", "matmul", "softcap"]

_PRECISION = jax.lax.Precision.HIGHEST  # no TF32 on GPU, no single bfloat16 pass on TPU


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product [.., out] of operands of the kernel's type, accumulated in float32."""
    return jnp.matmul(
        x.astype(kernel.dtype), kernel, precision=_PRECISION, preferred_element_type=jnp.float32
    )


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector [n] in float32 and in the rank of x [.., n], to be added to it or multiplied."""
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + vector.shape)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Squash x into (-cap, cap): cap tanh(x / cap). A cap of 0 leaves x as it is."""
    return cap * jnp.tanh(x / cap) if cap else x
