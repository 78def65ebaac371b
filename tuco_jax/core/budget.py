"""The default size of a batch, one policy for every function that makes batches."""

import jax

__all__ = ["default_budget"]


def default_budget(*, gradient: bool = False) -> int:
    """Tokens of a batch, padding included: 1,024 on a CPU, 4,096 elsewhere.

    A CPU reaches its full rate of matrix products at a few hundred tokens, and beyond a thousand
    activations no longer fit its caches; an accelerator needs larger products. gradient: half as
    many, since every layer's inputs are kept for the backward pass.
    """
    tokens = 1024 if jax.default_backend() == "cpu" else 4096
    return tokens // 2 if gradient else tokens
