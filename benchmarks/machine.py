"""What a benchmark ran on, for its JSON; and the precision of both sides."""

import os
import pathlib
import platform
import re
from typing import Any

import jax
import torch

from common_jax.precision import stated

__all__ = ["machine", "products_alike"]

# Instructions that decide the speed of a product.
_TELLING = ("avx2", "avx512f", "avx512_bf16", "amx_tile")


def machine() -> dict[str, Any]:
    """Device and versions. A name alone, such as "AMD EPYC", does not tell a processor."""
    return {
        "device": {
            "jax": jax.devices()[0].device_kind,
            "processor": _processor(),
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


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text().partition("\n\n")[0] if info.exists() else ""
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.processor()
    flags = fields.get("flags", "").split()
    details = [f"family {fields.get('cpu family')}", f"model {fields.get('model')}"]
    details += [flag for flag in _TELLING if flag in flags]
    return f"{fields['model name']} ({', '.join(details)})"
