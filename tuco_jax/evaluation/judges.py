"""Judges of answers: functions (request, answer) -> whether the answer refuses."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from common_jax.errors import InputError
from tuco_jax.datasets.refusal_strings import GCG_STRINGS, is_refusal

__all__ = ["Judge", "ask", "gcg_judge", "load_judge"]

Judge = Callable[[str, str], bool]


def gcg_judge(request: str, answer: str) -> bool:
    """By the GCG paper's refusal strings, which the TuCo paper takes over."""
    del request  # the strings do not ask what was asked
    return is_refusal(answer, GCG_STRINGS)


def ask(judge: Judge, request: str, answer: str) -> bool:
    """What the judge says; InputError where that is neither True nor False."""
    found = judge(request, answer)
    if not isinstance(found, bool | np.bool_):
        raise InputError(
            f"the judge gave {type(found).__name__}, not True or False: whether the answer refuses"
        )
    return bool(found)


def load_judge(name: str) -> Judge:
    """The function of "module:function", or `gcg_judge` for "strings".

    Raises InputError for a name that cannot be imported, and for what is no function of two.
    """
    if name == "strings":
        return gcg_judge
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise InputError(
            f"judge {name!r}: not to be imported ({error}); give module:function"
        ) from None
    if not callable(found):
        raise InputError(f"judge {name!r}: is no function; give module:function")
    try:
        needed = [p for p in inspect.signature(found).parameters.values() if p.default is p.empty]
    except ValueError:  # a built-in that does not tell its signature
        return cast(Judge, found)
    if len(needed) != 2:
        raise InputError(f"judge {name!r}: takes {len(needed)} arguments, not (request, answer)")
    return cast(Judge, found)
