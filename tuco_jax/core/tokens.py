"""Token ids and masks as functions are given them: arrays, or lists that are as good as such.

Ids are looked at where that is possible, outside compiled functions: an embedding's lookup takes
whatever it is given, counts negative ids from the end, and clamps those beyond it.

Legend: B rows, T tokens of a row, n tokens of one prompt.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, Shaped

from common_jax.errors import InputError

__all__ = ["as_mask", "as_tokens", "check_row"]


def as_tokens(tokens: Any, vocab_size: int, name: str = "tokens") -> Int[Array, "B T"]:
    """Tokens [B, T] as an array; raises InputError where they are none, or beyond the vocabulary.

    Arrays that are traced, or that lie in part with other processes, are not looked into.
    """
    found = _array(tokens, name)
    if found.ndim != 2:
        raise InputError(f"{name} have shape {list(found.shape)}: give [B, T], rows of token ids")
    _check(found, vocab_size, name)
    return found if isinstance(found, jax.Array) else jnp.asarray(found, jnp.int32)


def as_mask(mask: Any, tokens: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T"]:
    """A mask as an array; None: all tokens are real. Raises InputError for another shape."""
    if mask is None:
        return jnp.ones(tokens.shape[:2], bool)
    found = _array(mask, "mask")
    if found.shape != tokens.shape[:2]:
        raise InputError(
            f"mask has shape {list(found.shape)}, but tokens have {list(tokens.shape[:2])}: give "
            "one value a token"
        )
    return found if isinstance(found, jax.Array) else jnp.asarray(found)


def check_row(row: Any, vocab_size: int, name: str) -> Int[np.ndarray, " n"]:
    """One prompt's token ids, int32, on the host; raises InputError as `as_tokens`."""
    found = np.asarray(_array(row, name))
    if found.ndim != 1:
        raise InputError(f"{name} has shape {list(found.shape)}: give token ids in one list")
    if found.size:
        _check(found, vocab_size, name)
    return found.astype(np.int32, copy=False)


def _array(given: Any, name: str) -> Any:
    if isinstance(given, jax.Array | np.ndarray):
        return given
    try:
        return np.asarray(given)
    except ValueError:
        raise InputError(
            f"{name}: rows of unequal lengths; pad them to one, and give a mask of real tokens"
        ) from None


def _check(tokens: Any, vocab_size: int, name: str) -> None:
    """Raise InputError for an id that is no number of a token."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"{name} are {tokens.dtype}: token ids are whole numbers")
    if isinstance(tokens, Tracer) or not tokens.size:
        return
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return
    ids = np.asarray(tokens)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise InputError(
            f"{name}: token {wrong[0]} is outside the tuned model's vocabulary of {vocab_size}"
        )
