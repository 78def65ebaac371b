"""Pairs of many kinds, and both forms of the decomposition, each compiled once for all tests."""

import jax
import jax.numpy as jnp

from tests.tuco import random_models as rm
from tuco_jax.core.decompose import decompose as eager_decompose
from tuco_jax.core.last_token import last_token as eager_last_token
from tuco_jax.core.places import last_column

PAIRS = {
    "full": rm.full_pair,
    "adapter": rm.adapter_pair,
    "post_norm": lambda: rm.full_pair(base=rm.config(post_norm=True, norm_offset=1.0)),
    "parallel": lambda: rm.full_pair(base=rm.config(parallel=True, norm="layer", gated=False)),
    "one_layer": lambda: rm.full_pair(base=rm.config(depth=1, rope_index=(1,), windows=(4,))),
    "configs_differ": lambda: rm.full_pair(
        base=rm.config(),
        tuned=rm.config(
            ropes=(rm.rope(8, 3e4), rm.rope(8, 99.0)), windows=(0, 0, 3), norm_eps=1e-2
        ),
    ),
}

# Eager execution compiles every operation by itself.
decompose = jax.jit(eager_decompose, static_argnames=("layers", "logits", "parts"))
last_token = jax.jit(eager_last_token, static_argnames="norm")


def at_last(x: jax.Array, mask: jax.Array) -> jax.Array:
    return x[..., jnp.arange(len(mask)), last_column(mask), :]
