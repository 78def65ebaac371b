"""Adapters that are no low-rank sum: the weight that each makes of the base's.

Legend: O outputs and I inputs of a linear module, r rank. A weight W is [O, I], float32. An
embedding, whose table is [V, D], counts as a module of V inputs and D outputs. Formulas are those
of the `peft` library, whose merged models the tests compare with.
"""

import numpy as np
from jaxtyping import Float

__all__ = ["dora", "loha", "lokr", "scaled"]

Weight = Float[np.ndarray, "O I"]


def dora(
    weight: Weight, delta: Weight, magnitude: Float[np.ndarray, " O"]
) -> Float[np.ndarray, "O I"]:
    """DoRA (arXiv 2402.09353, eq. 5): m (W + dW) / |W + dW|, norms along the inputs."""
    moved = weight + delta
    return moved * (magnitude / np.linalg.norm(moved, axis=1))[:, None]


def loha(
    w1_a: Float[np.ndarray, "O r"],
    w1_b: Float[np.ndarray, "r I"],
    w2_a: Float[np.ndarray, "O r"],
    w2_b: Float[np.ndarray, "r I"],
) -> Float[np.ndarray, "O I"]:
    """LoHa (FedPara, arXiv 2108.06098): the Hadamard product of two low-rank matrices."""
    return (w1_a @ w1_b) * (w2_a @ w2_b)


def lokr(
    w1: Float[np.ndarray, "o1 i1"], w2: Float[np.ndarray, "o2 i2"]
) -> Float[np.ndarray, "O I"]:
    """LoKr (LyCORIS, arXiv 2309.14859): the Kronecker product, O = o1 o2 and I = i1 i2."""
    return np.kron(w1, w2)


def scaled(weight: Weight, factor: Float[np.ndarray, "..."]) -> Float[np.ndarray, "O I"]:
    """IA3 (arXiv 2205.05638): outputs scaled by a factor [O, 1], or inputs by one of [1, I]."""
    return weight * factor
