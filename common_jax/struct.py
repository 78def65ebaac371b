"""Frozen dataclasses as pytrees, which compiled programs tell apart by their class.

To JAX 0.10.2 (`jax.tree_util.register_dataclass`, by which flax.struct registers) structures of
two classes are equal where their fields are alike in number and static values; their hashes alone
differ. A cache of compiled programs looks at a part of the hashes, and compares where that agrees:
of some fifty processes one runs the program of one class for the other. Classes registered here
equal themselves alone; what users bring is wrapped by `apart`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, dataclass_transform

import jax
from jaxtyping import PyTree

__all__ = ["Apart", "apart", "dataclass", "field"]

_T = TypeVar("_T")
_OURS: set[type] = set()


def field(*, pytree_node: bool = True, **kwargs: Any) -> Any:
    """`dataclasses.field`; pytree_node: whether it holds arrays, or is a part of the structure."""
    return dataclasses.field(metadata={"pytree_node": pytree_node}, **kwargs)


@dataclass_transform(field_specifiers=(field, dataclasses.field))
def dataclass(cls: type[_T]) -> type[_T]:
    """A frozen dataclass that is a pytree, with `replace(**changes)`."""
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = {x.name: x.metadata.get("pytree_node", True) for x in dataclasses.fields(made)}
    arrays, static = ([n for n, kind in fields.items() if kind is of] for of in (True, False))
    keys = [jax.tree_util.GetAttrKey(name) for name in arrays]

    def rest(tree: Any) -> tuple[Any, ...]:
        return tuple(getattr(tree, name) for name in static)

    def flatten(tree: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(tree, name) for name in arrays], rest(tree)

    def flatten_with_keys(tree: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [(key, getattr(tree, key.name)) for key in keys], rest(tree)

    def unflatten(rest: tuple[Any, ...], children: Iterable[Any]) -> Any:
        given = zip((*arrays, *static), (*children, *rest), strict=True)
        return made(**dict(given))

    made.replace = dataclasses.replace
    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    _OURS.add(made)
    return made


@dataclass
class Apart:
    """A value of a class that is not registered here, in a structure that names its classes.

    It is called, and has attributes, as the value.
    """

    value: Any
    classes: tuple[type, ...] = field(pytree_node=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value, name)


def apart(tree: PyTree[Any]) -> PyTree[Any]:
    """A tree as an argument of a compiled function: dataclasses of others are in `Apart`.

    Without any it is the tree itself.
    """
    if not any(_others(jax.tree.structure(tree))):
        return tree

    def wrapped(x: Any) -> Any:
        return Apart(x, tuple(_others(jax.tree.structure(x)))) if _is_other(type(x)) else x

    return jax.tree.map(wrapped, tree, is_leaf=lambda x: _is_other(type(x)))


def _others(structure: Any) -> Iterator[type]:
    if (node := structure.node_data()) and _is_other(node[0]):
        yield node[0]
    for child in structure.children():
        yield from _others(child)


def _is_other(cls: type) -> bool:
    """Whether it is a dataclass, and a node to JAX, and not of `dataclass`."""
    return dataclasses.is_dataclass(cls) and cls not in _OURS and _is_node(cls)


@functools.cache
def _is_node(cls: type) -> bool:
    return not jax.tree_util.all_leaves([object.__new__(cls)])
