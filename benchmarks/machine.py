"""What a benchmark ran on, for its JSON; and the precision of both sides."""

import os
import platform
from typing import Any

import jax
import torch

from common_jax.machine import processor
from common_jax.precision import stated

__all__ = ["machine", "products_alike"]


def machine() -> dict[str, Any]:
    """Device and versions."""
    return {
        "device": {
            "jax": jax.devices()[0].device_kind,
            "processor": processor(),
            "cores": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "torch": torch.__version__,
        },
    }


def products_alike() -> str:
    """Have PyTorch multiply float32 as `reward_jax` does, in float32 unless JAX is told otherwise.

    Returns which: "float32", or what JAX was told, for which PyTorch has TF32.
    """
    quick = (precision := stated()) != "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = quick
    return precision
