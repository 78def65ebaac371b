"""Checksums of what a result depends on, for runs to be resumed with the same (`resume`).

Arrays count by their bits, dtypes and shapes; texts, numbers, dataclasses (modules and options
among them) and trees by what they hold. A function of arrays has none of these: it counts by the
program that JAX writes of it. Nothing counts by its address, which is another in every process:
what only that tells apart is refused. Another version of JAX may write another program.

A checksum is of one thing; what all the scores of a run depend on has a fingerprint.
"""

import dataclasses
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.tree_util import default_registry

from common_jax.errors import InputError
from common_jax.mesh import fetch

__all__ = ["checksum", "program_checksum"]

_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")
_PROGRAM = Jaxpr | ClosedJaxpr
_HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def checksum(value: Any) -> str:
    """Of a value, a tree of some, or a dataclass; 16 hexadecimal digits.

    Raises InputError, naming it, for a part that has no more than an address.
    """
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(f"{len(part)}:".encode())
        found.update(part)
    return found.hexdigest()[:16]


def program_checksum(function: Callable[..., Any], *given: Any) -> str:
    """Of what a function computes from arrays like these, and all that it closes over.

    given: arrays, or trees of them, whose values do not matter. Raises InputError for a function
    that asks the host, by a callback, for what has no name.
    """
    return checksum(jax.make_jaxpr(function)(*given))


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    """What tells a value from others."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        yield f"key {value.dtype}".encode()
        value = jax.random.key_data(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(fetch(value))
        yield f"array {array.dtype} {array.shape}".encode()
        if array.dtype.hasobject:
            yield from _parts(array.tolist())
        else:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    elif isinstance(value, ClosedJaxpr):
        yield from _parts(value.consts)
        yield from _equations(value.jaxpr)
    elif isinstance(value, Jaxpr):
        yield from _equations(value)
    elif isinstance(value, set | frozenset):
        yield from _parts(sorted(map(checksum, value)))
    elif isinstance(value, Mapping):
        yield from _named(type(value), {_text(k): v for k, v in value.items()})
    elif isinstance(value, tuple | list):
        yield from _named(type(value), dict(enumerate(value)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        yield from _named(type(value), held)
    elif value is not None and (node := default_registry.flatten_one_level(value)):
        yield from _named(type(value), {"children": list(node[0]), "other": node[1]})
    else:
        yield _text(value).encode()


def _named(kind: type, held: Mapping[Any, Any]) -> Iterator[bytes | memoryview]:
    yield f"{kind.__qualname__} {len(held)}".encode()
    for name in sorted(held):
        yield f"{name}".encode()
        yield from _parts(held[name])


def _text(value: Any) -> str:
    """The name of a function or class that a module has, of others the `repr`."""
    if callable(value):
        module, name = (getattr(value, x, "") for x in ("__module__", "__qualname__"))
        found = sys.modules.get(module)
        for step in name.split("."):
            found = getattr(found, step, None)
        if found is value:
            return f"{module}.{name}"
    text = repr(value)
    if _ADDRESS.search(text):
        raise InputError(
            f"checkpoints: nothing but its address tells {_ADDRESS.sub('...', text)[:80]} from "
            "another, so that a run of another could be taken for this one: give its class a "
            "__repr__, or make it a function of a module"
        )
    return f"{type(value).__qualname__} {text}"


def _equations(jaxpr: Jaxpr) -> Iterator[bytes | memoryview]:
    """A program: its equations, with variables counted in the order in which they appear."""
    seen: dict[Any, int] = {}
    placed: dict[Any, Any] = {}  # of what a program says no more than where it lies

    def source(atom: Any) -> Any:
        return atom if isinstance(atom, Literal) else placed.get(atom, atom)

    def of(atom: Any) -> Any:
        atom = source(atom)
        known = atom.val if isinstance(atom, Literal) else seen.setdefault(atom, len(seen))
        return known, str(atom.aval)

    yield from _parts([of(x) for x in (*jaxpr.constvars, *jaxpr.invars)])
    for equation in jaxpr.eqns:
        params = equation.params
        if "callback" in params and not equation.outvars:
            continue  # it prints, and changes no result
        if equation.primitive.name == "sharding_constraint":
            placed[equation.outvars[0]] = source(equation.invars[0])
            continue
        if equation.primitive.name == "jit":
            params = {"jaxpr": params["jaxpr"]}  # the rest is where it runs, and its name
        elif any(isinstance(x, _PROGRAM) for x in jax.tree.leaves(list(params.values()))):
            # Functions beside a program say how it is differentiated, not what it gives.
            params = {k: v for k, v in params.items() if not _is_function(v)}
        if params.get("precision") == _HIGHEST:  # where none is said products are so precise
            params = params | {"precision": None}
        yield equation.primitive.name.encode()
        yield from _parts([params, *map(of, (*equation.invars, *equation.outvars))])
    yield from _parts([of(x) for x in jaxpr.outvars])


def _is_function(value: Any) -> bool:
    return callable(value) or hasattr(value, "call_wrapped")
