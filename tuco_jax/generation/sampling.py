"""Choosing the next token from logits: greedy, or temperature with top-k and top-p.

Legend: B batch, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from common_jax import struct

__all__ = ["Sampling", "choose", "row_keys"]


@struct.dataclass
class Sampling:
    """How to choose. temperature None: the most likely token; the other fields are not used.

    Logits are divided by `temperature`; the `top_k` likeliest tokens stay (0: all of them); of
    those, the fewest whose probabilities reach `top_p` stay (None: all).
    """

    temperature: Float[Array, ""] | float | None = None
    top_p: Float[Array, ""] | float | None = None
    top_k: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def of(cls, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> "Sampling":
        """Settings as `GenerationOptions` has them."""
        if temperature == 0 or top_k == 1:
            return cls()
        return cls(temperature, top_p if top_p < 1 else None, top_k)


def row_keys(seed: int, rows: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key for each of `rows`: a row's sample depends on its number, not its batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def choose(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    keys: Key[Array, " B"],
    counts: Int[Array, " B"],
) -> Int[Array, " B"]:
    """The next token of each row, int32, from its logits, float32.

    keys: the rows' own. counts: how many tokens each row has generated before.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits, candidates = logits / sampling.temperature, None
    if sampling.top_k or sampling.top_p is not None:
        k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
        logits, candidates = jax.lax.top_k(logits, k)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of all likelier tokens
        first = jnp.arange(logits.shape[-1]) == 0
        logits = jnp.where((before < sampling.top_p) | first[None], logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(keys, counts)
    chosen = jax.vmap(jax.random.categorical)(keys, logits)
    if candidates is not None:
        chosen = jnp.take_along_axis(candidates, chosen[:, None], axis=-1)[:, 0]
    return chosen.astype(jnp.int32)
