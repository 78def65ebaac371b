"""Attention kernels of other projects, for rows that attend to themselves: splash and cuDNN.

Legend: B batch, T tokens, K key/value heads, G query heads of each, h head width. Both take
float32 queries, already scaled, and return float32. `window` is static here; 0: all earlier
tokens. `at` says where the tokens stand.

Both mask by column, not by position. Without a window a token sees the real ones before it either
way. With a window, and for cuDNN always, each row's real tokens are first moved to its front: then
columns are as far apart as positions, wherever the padding stood.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas.ops.tpu import splash_attention as ops
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from tuco_jax.models.positions import Positions

__all__ = ["cudnn", "splash"]

_LANES = 128  # rows are padded to a multiple of it
_PADDING = -(2**31)  # the segment of padding


def splash(
    window: int,
    cap: float,
    q: Float[Array, "B K G T h"],
    keys: Float[Array, "B K T h"],
    values: Float[Array, "B K T h"],
    at: Positions,
    *,
    interpret: bool = False,
) -> Float[Array, "B K G T h"]:
    """Splash attention (TPU): caps, windows, segments and padding; float32 stays float32.

    interpret: run the kernel in Pallas' interpreter, as a CPU must.
    """
    segments = jnp.zeros_like(at.index) if at.segments is None else at.segments
    segments = jnp.where(at.mask, segments, _PADDING).astype(jnp.int32)
    tokens, heads = q.shape[3], q.shape[1] * q.shape[2]
    missing = -tokens % _LANES
    kernel = _splash_over(tokens + missing, heads, window, cap, interpret)

    def pad(x: jax.Array, axis: int, value: int = 0) -> jax.Array:
        widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=value) if missing else x

    def run(q: jax.Array, keys: jax.Array, values: jax.Array, segments: jax.Array) -> jax.Array:
        q, ids = pad(q.astype(keys.dtype), 3), pad(segments, 1, _PADDING)
        return kernel(q, pad(keys, 2), pad(values, 2), ids)[..., :tokens, :].astype(jnp.float32)

    run = _together(run, at.mask) if window else run
    return run(q, keys, values, segments)


@functools.cache
def _splash_over(
    tokens: int, heads: int, window: int, cap: float, interpret: bool
) -> Callable[..., jax.Array]:
    """The kernel over q [B, K, G, T, h], keys, values [B, K, T, h] and segments [B, T] int.

    Rows and key/value heads may be sharded over a mesh: XLA does not partition Mosaic kernels by
    itself, so that the rule is stated here.
    """
    shape = tokens, tokens
    mask = ops.LocalMask(shape, (window - 1, 0), 0) if window else ops.CausalMask(shape)
    size = next(s for s in (512, 384, 256, 128) if tokens % s == 0)
    with jax.ensure_compile_time_eval():
        kernel = ops.make_splash_mha_single_device(
            ops.MultiHeadMask([mask] * heads),
            block_sizes=ops.BlockSizes(block_q=size, block_kv=size),
            attn_logits_soft_cap=cap or None,
            interpret=interpret,
        )
        tables, tree = jax.tree.flatten(jax.tree.map(np.asarray, kernel))

    def run(q, keys, values, segments, *tables):
        # Traced in here, products take this precision, and Mosaic then contracts in float32.
        exact = "highest" if keys.dtype == jnp.float32 else "default"
        flat = q.reshape(q.shape[0], -1, *q.shape[3:])
        with jax.default_matmul_precision(exact):
            kernel = jax.vmap(jax.tree.unflatten(tree, tables))
            return kernel(flat, keys, values, ops.SegmentIds(segments, segments)).reshape(q.shape)

    def partition(mesh, arguments, _):
        rows, shared = (*arguments[0].sharding.spec, None, None)[:2]
        by_head, by_row, whole = (
            NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((rows, shared), (rows,), ())
        )
        return mesh, run, by_head, (by_head, by_head, by_head, by_row, *(whole for _ in tables))

    names = [[f"m{i}{axis}" for axis in range(t.ndim)] for i, t in enumerate(tables)]
    rule = ", ".join(["b k g t h", "b k t h", "b k t h", "b t", *(" ".join(n) for n in names)])
    cut = custom_partitioning(run)
    cut.def_partition(
        partition=partition,
        sharding_rule=f"{rule} -> b k g t h",
        need_replication_factors=("g", "t", "h", *(n for axes in names for n in axes)),
    )
    cut = jax.custom_batching.sequential_vmap(cut)
    return lambda *arrays: cut(*arrays, *tables)


def cudnn(
    window: int,
    cap: float,
    q: Float[Array, "B K G T h"],
    keys: Float[Array, "B K T h"],
    values: Float[Array, "B K T h"],
    at: Positions,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B K G T h"]:
    """Flash attention by cuDNN (CUDA): bfloat16 or float16, no cap, no segments.

    implementation: "xla" computes the same without a GPU, for tests.
    """
    assert not cap and at.segments is None and keys.dtype != jnp.float32

    def run(q: jax.Array, keys: jax.Array, values: jax.Array, _: jax.Array) -> jax.Array:
        rows, shared, group, tokens, width = q.shape
        flat = q.astype(keys.dtype).reshape(rows, shared * group, tokens, width)
        out = jax.nn.dot_product_attention(
            *(a.swapaxes(1, 2) for a in (flat, keys, values)),
            scale=1.0,
            is_causal=True,
            local_window_size=(window - 1, 0) if window else None,
            implementation=implementation,
        )
        return out.swapaxes(1, 2).reshape(q.shape).astype(jnp.float32)

    return _together(run, at.mask)(q, keys, values, at.index)


def _together(run: Callable[..., jax.Array], mask: Bool[Array, "B T"]) -> Callable[..., jax.Array]:
    """`run` over q, keys, values and [B, T] ints, each row's real tokens moved to its front."""
    order = jnp.argsort(~mask, axis=1, stable=True)

    def take(x: jax.Array, axis: int, order: jax.Array = order) -> jax.Array:
        return jax.vmap(functools.partial(jnp.take, axis=axis - 1))(x, order)

    def together(q: jax.Array, keys: jax.Array, values: jax.Array, ids: jax.Array) -> jax.Array:
        out = run(take(q, 3), take(keys, 2), take(values, 2), take(ids, 1))
        return take(out, 3, jnp.argsort(order, axis=1))

    return together
