"""What a program runs on, as results say it."""

import pathlib
import platform
import re

__all__ = ["processor"]

# Instructions that decide the speed of a product.
_TELLING = ("avx2", "avx512f", "avx512_bf16", "amx_tile")


def processor() -> str:
    """Name, family and model, and what it multiplies with.

    A name alone, such as "AMD EPYC", does not tell a processor, nor how sums are rounded there.
    """
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text().partition("\n\n")[0] if info.exists() else ""
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.processor()
    flags = fields.get("flags", "").split()
    details = [f"family {fields.get('cpu family')}", f"model {fields.get('model')}"]
    details += [flag for flag in _TELLING if flag in flags]
    return f"{fields['model name']} ({', '.join(details)})"
