"""Digests of what a result depends on, for runs to be resumed with the same (`resume`).

Arrays count by their bits, dtypes and shapes, modules and options by their fields. A function has
none of these: it counts by its program, the jaxpr with the constants that it closes over. Another
version of JAX may write another program.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

__all__ = ["Static", "digest", "program"]

_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+|\b0x[0-9a-f]{6,}|\bid=\d+")  # of this process alone


class Static:
    """A value that is no array, such as a module or options, as a part of a tree to digest."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def digest(tree: Any) -> str:
    """Of a pytree: its arrays, their names, and what is static in it; 16 hexadecimal digits."""
    found = hashlib.sha256(_ADDRESS.sub("", str(jax.tree.structure(tree))).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        value = np.asarray(leaf)
        found.update(f"{keystr(path)} {value.dtype} {value.shape} ".encode())
        if value.dtype == object:
            found.update(_ADDRESS.sub("", repr(leaf)).encode())
        else:
            found.update(np.ascontiguousarray(value).view(np.uint8).data)
    return found.hexdigest()[:16]


def program(function: Callable[..., Any], *given: Any) -> str:
    """Of a function of arrays like these, whose values do not matter: its program."""
    closed = jax.make_jaxpr(function)(*given)
    text = _ADDRESS.sub("", str(closed.jaxpr))
    return digest({"program": np.frombuffer(text.encode(), np.uint8), "constants": closed.consts})
