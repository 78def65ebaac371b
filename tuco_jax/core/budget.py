"""The default size of a batch, one policy for every function that makes batches."""

import jax

__all__ = ["default_budget", "pass_budget"]


def default_budget(*, gradient: bool = False) -> int:
    """Tokens of a batch, padding included: 1,024 on a CPU, 4,096 elsewhere.

    A CPU reaches its full rate of matrix products at a few hundred tokens, and beyond a thousand
    activations no longer fit its caches; an accelerator needs larger products. gradient: half as
    many, since every layer's inputs are kept for the backward pass.
    """
    tokens = 1024 if jax.default_backend() == "cpu" else 4096
    return tokens // 2 if gradient else tokens


def pass_budget() -> int:
    """Tokens that go through a layer before the next is read, where layers stream past.

    At 1 GB/s and 4 bytes a parameter computing takes ten times as long as reading at 0.8 TFLOP/s
    on a CPU, about as long at 60 on an accelerator.
    """
    return 1 << 15 if jax.default_backend() == "cpu" else 1 << 18
