"""How much is computed at once where the caller does not say: the one policy of batch sizes."""

import jax

__all__ = ["default_budget"]


def default_budget(*, gradient: bool = False) -> int:
    """Tokens of a batch, padding included: 1,024 on a CPU, 4,096 elsewhere.

    A CPU is at its rate of products from some hundred tokens on, and with more than a thousand
    what passes between products no longer fits its caches; an accelerator wants larger products.
    gradient: half as many, since every layer's inputs are kept for the way back.
    """
    tokens = 1024 if jax.default_backend() == "cpu" else 4096
    return tokens // 2 if gradient else tokens
