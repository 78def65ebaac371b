"""Token ids and masks as functions are given them: arrays, or lists that are as good as such.

Ids are looked at where that is possible, outside compiled functions: an embedding's lookup takes
whatever it is given, counts negative ids from the end, and clamps those beyond it. Under a mask
that is harmless, and usual (-100, or the id of a padding token that the model was not resized
for): there, any id stands for padding.

Legend: B rows, T tokens of a row, n tokens of one prompt.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, Shaped

from common_jax.errors import InputError

__all__ = ["as_mask", "as_tokens", "check_row"]


def as_tokens(
    tokens: Any, mask: Any, vocab_size: int
) -> tuple[Int[Array, "B T"], Shaped[Array, "B T"]]:
    """Tokens [B, T] and their mask as arrays; ids outside the vocabulary become 0 under the mask.

    Raises InputError for what is no such array, and for other ids outside the vocabulary. Arrays
    that are traced, or that lie in part with other processes, are not looked into.
    """
    found = _array(tokens, "tokens")
    if found.ndim != 2:
        raise InputError(f"tokens have shape {list(found.shape)}: give [B, T], rows of token ids")
    mask = as_mask(mask, found)
    wrong = _outside(found, vocab_size, "tokens")
    if wrong is not None and wrong.any() and _is_known(mask):
        real = wrong & np.asarray(mask, bool)
        if real.any():
            raise InputError(
                f"tokens: token {np.asarray(found)[real][0]} is outside the tuned model's "
                f"vocabulary of {vocab_size}; give padding a mask of 0"
            )
        found = np.where(wrong, 0, np.asarray(found))
    return found if isinstance(found, jax.Array) else jnp.asarray(found, jnp.int32), mask


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
    wrong = _outside(found, vocab_size, name) if found.size else None
    if wrong is not None and wrong.any():
        raise InputError(
            f"{name}: token {found[wrong][0]} is outside the tuned model's vocabulary of "
            f"{vocab_size}"
        )
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


def _outside(tokens: Any, vocab_size: int, name: str) -> Bool[np.ndarray, "..."] | None:
    """Which ids are no number of a token; None where that cannot be seen."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"{name} are {tokens.dtype}: token ids are whole numbers")
    if not _is_known(tokens):
        return None
    ids = np.asarray(tokens)
    return (ids < 0) | (ids >= vocab_size)


def _is_known(values: Any) -> bool:
    """Whether all values are here to be looked at."""
    if isinstance(values, Tracer):
        return False
    return not isinstance(values, jax.Array) or values.is_fully_addressable
