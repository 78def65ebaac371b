"""Results that an earlier start wrote, read back."""

import json
import pathlib
from typing import Any

from common_jax.errors import InputError

__all__ = ["read_result"]


def read_result(
    path: pathlib.Path, wanted: Any, mend: str = "delete it, and it is made again"
) -> Any:
    """One JSON document; InputError, with the mend, where it is cut short or lacks something.

    wanted: what must be there: {key: what it holds}, [what each item holds], or None for anything.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {mend}") from error
    except ValueError:  # not UTF-8, or no JSON
        raise InputError(f"{path}: is damaged or cut short; {mend}") from None
    if lack := _lack(found, wanted, ""):
        raise InputError(f"{path}: is damaged, it has no {lack}; {mend}")
    return found


def _lack(found: Any, wanted: Any, name: str) -> str:
    """Name of the first thing that is not there, or ""."""
    if wanted is None:
        return ""
    if not isinstance(found, type(wanted)):
        return f"{'list' if isinstance(wanted, list) else 'mapping'} {name}".strip()
    if isinstance(wanted, list):
        parts = [(value, wanted[0], f"{name}[{i}]") for i, value in enumerate(found)]
    else:
        dot = f"{name}." if name else ""
        missing = [key for key in wanted if key not in found]
        if missing:
            return dot + missing[0]
        parts = [(found[key], inner, dot + key) for key, inner in wanted.items()]
    return next((lack for part in parts if (lack := _lack(*part))), "")
