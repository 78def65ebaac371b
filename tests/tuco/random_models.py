"""Small random models of our own, every tensor random, for identities that need no reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig, Rope
from tuco_jax.models.pair import Pair


def rope(dim: int, base: float = 1e4) -> Rope:
    return Rope(tuple((base ** (-np.arange(0, dim, 2) / dim)).tolist()), base=base)


def config(**changes) -> ModelConfig:
    """A three-layer model with grouped heads, biases, two rotary tables and a window."""
    fields: dict[str, Any] = dict(
        family="llama",
        vocab_size=61,
        width=24,
        depth=3,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_width=40,
        max_positions=64,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        ropes=(rope(8), rope(8, 500.0)),
        rope_index=(0, 1, 0),
        windows=(0, 5, 0),
    )
    return ModelConfig(**(fields | changes))


def params(config: ModelConfig, seed: int, scale: float = 0.3):
    """Parameters with every leaf random: biases and norms, too."""
    rng = np.random.default_rng(seed)

    def leaf(path, spec):
        shift = 1 - config.norm_offset if path[-1].key == "scale" else 0
        return jnp.asarray(shift + scale * rng.normal(size=spec.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, decoder.param_shapes(config))


def lora(config: ModelConfig, seed: int, rank: int = 3, scale: float = 0.3):
    """Random low-rank factors for every linear layer of the blocks."""
    layers = decoder.param_shapes(config)["layers"]
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    def factors(tree):
        if "kernel" in tree:
            *stacked, rows, columns = tree["kernel"].shape
            return {"a": normal(*stacked, rows, rank), "b": normal(*stacked, rank, columns)}
        return {k: factors(v) for k, v in tree.items() if isinstance(v, dict) and "scale" not in v}

    return {"layers": factors(layers)}


def full_pair(seed: int = 0, base: ModelConfig | None = None, tuned: ModelConfig | None = None):
    """A pair of two full models, the tuned one near the base."""
    base = base or config()
    tuned = tuned or base
    old = params(base, seed)
    new = jax.tree.map(lambda a, b: a + 0.3 * b, old, params(tuned, seed + 1))
    return Pair(old, new, {}, base, tuned)


def different_configs():
    """A pair whose two models differ in rotary bases, windows and epsilon."""
    base = config(ropes=(rope(8, 1e3), rope(8, 700.0)), windows=(4, 0, 0))
    return full_pair(4, base, config(norm_eps=1e-4, windows=(0, 5, 0)))


def adapter_pair(seed: int = 0, base: ModelConfig | None = None):
    """A pair of a model and low-rank factors."""
    base = base or config()
    return Pair(params(base, seed), {}, lora(base, seed + 1), base, base)


def batch(rows: int = 4, length: int = 11, seed: int = 0, vocab: int = 61, side: str = "right"):
    """Tokens [B, T] and mask [B, T] of unequal lengths, padding tokens random, too."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[length], rng.integers(1, length + 1, rows - 1)])
    columns = np.arange(length)[None]
    if side == "right":
        mask = columns < lengths[:, None]
    else:
        mask = columns >= length - lengths[:, None]
    return jnp.asarray(rng.integers(0, vocab, (rows, length))), jnp.asarray(mask)
