"""PEFT's files: what they are called, and how factors of fused modules fall to their parts."""

import numpy as np
from jaxtyping import Int

from tuco_jax.models.config import ModelConfig
from tuco_jax.weights.keys import Stored

__all__ = ["CHAT_TEMPLATE", "CONFIG", "PREFIX", "WEIGHTS", "fed_rows", "is_conv1d"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"  # as transformers names it, too
PREFIX = "base_model.model."  # before the name of every adapted module


def is_conv1d(row: Stored, config: ModelConfig, inputs: int, outputs: int) -> bool:
    """Whether a weight is stored as [in, out] (GPT-2) rather than [out, in]."""
    columns = np.broadcast_to(np.arange(outputs), (inputs, outputs))
    try:
        parts = row.layout.split(columns, config)
    except ValueError:
        return False
    return all(p.shape[0] == inputs and (p[0] == p[-1]).all() for p in parts) and inputs > 1


def fed_rows(
    row: Stored, config: ModelConfig, inputs: int, outputs: int
) -> list[Int[np.ndarray, " part"]]:
    """Which outputs of a (fused) module feed each of its parameters, in their order.

    Found by splitting a matrix that holds the number of its output in every entry.
    """
    numbers = np.broadcast_to(np.arange(outputs), (inputs, outputs))
    if not is_conv1d(row, config, inputs, outputs):
        numbers = numbers.T
    return [np.asarray(part[0]) for part in row.layout.split(numbers, config)]
