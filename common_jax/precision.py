"""In what products of float32 numbers are computed: in float32, where nobody says otherwise.

XLA's own choice is TF32 on recent GPUs and one pass of bfloat16 on TPUs, of three digits, and what
is asked here is a difference of two models. So `jit` and `precise` trace a program at JAX's
highest precision. What a user has set (`jax.default_matmul_precision`, the variable
JAX_DEFAULT_MATMUL_PRECISION, --precision) wins. A CPU multiplies in float32 at any of them.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax

__all__ = ["applied", "jit", "precise", "stated"]

_config: Any = jax.config  # whose options no type checker knows
_VARIABLE = "JAX_DEFAULT_MATMUL_PRECISION"

F = TypeVar("F", bound=Callable[..., Any])


def precise(function: F) -> F:
    """The same function, its float32 products in float32, unless the user has said otherwise."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = _config.jax_default_matmul_precision
        with jax.default_matmul_precision(chosen or "highest"):
            return function(*args, **kwargs)

    return cast(F, call)


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` of `precise(function)`: a call of what is compiled costs no more.

    options: of `jax.jit`. What a user has set is a part of JAX's key of compiled programs.
    """
    return jax.jit(precise(function), **options)


def stated() -> str:
    """What such products are computed in now, as JAX names it, for reports."""
    chosen = _config.jax_default_matmul_precision
    return "float32" if chosen in (None, "highest") else str(chosen)


@contextlib.contextmanager
def applied(precision: str | None) -> Iterator[None]:
    """A user's choice in all threads, and in processes that are started meanwhile; None: none."""
    if precision is None:
        yield
        return
    before = _config.jax_default_matmul_precision, os.environ.get(_VARIABLE)
    jax.config.update("jax_default_matmul_precision", precision)
    os.environ[_VARIABLE] = precision
    try:
        yield
    finally:
        jax.config.update("jax_default_matmul_precision", before[0])
        os.environ.pop(_VARIABLE)
        if before[1] is not None:
            os.environ[_VARIABLE] = before[1]
