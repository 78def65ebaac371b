"""Choosing the next token from logits: greedy, or temperature with top-k and top-p.

Legend: B batch, V vocabulary, k candidates.
"""

import jax
import jax.numpy as jnp
from flax import struct

__all__ = ["Sampling", "choose", "row_keys"]


@struct.dataclass
class Sampling:
    """How to choose. temperature None: the most likely token, and the rest is not looked at.

    Logits are divided by `temperature`; the `top_k` likeliest tokens stay (0: all of them); of
    those, the fewest whose probabilities reach `top_p` stay (None: all).
    """

    temperature: jax.Array | float | None = None
    top_p: jax.Array | float | None = None
    top_k: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def of(cls, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> "Sampling":
        """Settings as `GenerationOptions` has them."""
        if temperature == 0 or top_k == 1:
            return cls()
        return cls(temperature, top_p if top_p < 1 else None, top_k)


def row_keys(seed: int, rows: jax.Array) -> jax.Array:
    """One key for each of `rows` [B] int: a row's sample depends on its number, not its batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def choose(logits: jax.Array, sampling: Sampling, keys: jax.Array, counts: jax.Array) -> jax.Array:
    """The next token of each row, [B] int32, from logits [B, V] float32.

    keys [B]: the rows' own keys; counts [B]: how many tokens each row has generated before.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scores, candidates = logits / sampling.temperature, None
    if sampling.top_k or sampling.top_p is not None:
        k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
        scores, candidates = jax.lax.top_k(scores, k)
    if sampling.top_p is not None:
        shares = jax.nn.softmax(scores, axis=-1)
        likelier = jnp.cumsum(shares, axis=-1) - shares  # of the tokens before this one
        first = jnp.arange(scores.shape[-1]) == 0
        scores = jnp.where((likelier < sampling.top_p) | first, scores, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(keys, counts)
    chosen = jax.vmap(jax.random.categorical)(keys, scores)
    if candidates is not None:
        chosen = jnp.take_along_axis(candidates, chosen[:, None], axis=-1)[:, 0]
    return chosen.astype(jnp.int32)
