"""Loops over steps in which convolutions are quick on a CPU, whoever's network holds them.

XLA's CPU compiler brings a convolution into the one form that its library computes (channels last,
kernels [taps, inputs, outputs]) only where it stands in a program's outermost computation. In a
loop's body, or a branch's, derivatives of convolutions are in other forms, and take 10 to 20 times
as long. So what loops here repeat is written in that form before the compiler sees it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array, PyTree, Shaped

__all__ = ["canonical", "scan"]

_GROUPS = 8  # convolutions of so many groups, such as seeds under vmap, are computed one by one
# What holds programs that are rewritten in place: loops, branches, and functions with a rule of
# their own for derivatives, which is kept as it is. checkpoint and remat2 are names of one.
_HOLDERS = ("scan", "while", "cond", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")


def scan(
    one: Callable[..., Any], carry: PyTree[Shaped[Array, "..."]], xs: PyTree[Shaped[Array, "..."]]
) -> tuple[Any, Any]:
    """`jax.lax.scan`, by `canonical` on a CPU."""
    loop = functools.partial(jax.lax.scan, one)
    return (canonical(loop) if jax.default_backend() == "cpu" else loop)(carry, xs)


def canonical(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with every convolution in the form that is quick in a loop on a CPU.

    For a loop of one's own, derivatives within it and all. Derivatives taken of it from outside
    are right, those of `jax.custom_vjp` and `jax.custom_jvp` too, but not in that form.
    """

    def rewritten(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        found = _evaluated(program, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return rewritten


def _holds_convolution(program: Jaxpr) -> bool:
    return any(
        equation.primitive.name == "conv_general_dilated"
        or any(_holds_convolution(part.jaxpr) for part in _parts(equation.params))
        for equation in program.eqns
    )


def _parts(params: Mapping[str, Any]) -> Iterator[ClosedJaxpr]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield _closed(part)


def _closed(program: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
    return ClosedJaxpr(program, ()) if isinstance(program, Jaxpr) else program


def _evaluated(program: ClosedJaxpr, given: Sequence[Any]) -> list[Any]:
    """What the program gives, its convolutions computed by `_convolution`."""
    known: dict[Any, Any] = {}

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    inner = program.jaxpr
    known.update(zip((*inner.constvars, *inner.invars), (*program.consts, *given), strict=True))
    for equation in inner.eqns:
        known.update(
            zip(equation.outvars, _results(equation, [*map(value, equation.invars)]), strict=True)
        )
    return [value(atom) for atom in inner.outvars]


def _results(equation: Any, given: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        return [_convolution(*given, **params)]
    if any(_holds_convolution(part.jaxpr) for part in _parts(params)):
        if name == "jit":
            return _evaluated(_closed(params["jaxpr"]), given)
        if name in _HOLDERS:
            params = {key: _rewritten(part) for key, part in params.items()}
    found = equation.primitive.bind(*given, **equation.primitive.get_bind_params(params))
    return found if equation.primitive.multiple_results else [found]


def _rewritten(part: Any) -> Any:
    """A parameter of what holds programs; each of these with its convolutions in that form."""
    if isinstance(part, tuple | list):
        return type(part)(map(_rewritten, part)) if type(part) in (tuple, list) else part
    if not isinstance(part, ClosedJaxpr | Jaxpr):
        return part
    closed = _closed(part)
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type) for x in closed.in_avals
    ]
    made = jax.make_jaxpr(lambda *given: _evaluated(closed, given))(*shapes)
    return made if isinstance(part, ClosedJaxpr) else made.jaxpr


def _convolution(x: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    """A convolution with channels last, between transpositions."""
    axes = params.pop("dimension_numbers")
    x = jnp.transpose(x, _channels_last(axes.lhs_spec))
    outputs, inputs, *taps = axes.rhs_spec
    kernel = jnp.transpose(kernel, (*taps, inputs, outputs))
    if math.prod(kernel.shape[:-2]) > math.prod(x.shape[1:-1]):
        x = _padded(x, params)
    last = x.ndim - 1
    images = (0, last, *range(1, last))
    form = jax.lax.ConvDimensionNumbers(images, (last, last - 1, *range(last - 1)), images)
    by_feature, by_batch = (params.pop(f"{of}_group_count") for of in ("feature", "batch"))
    groups = max(by_feature, by_batch)
    if groups > _GROUPS:
        params |= {"feature_group_count": by_feature, "batch_group_count": by_batch}
        groups = 1
    parts = zip(
        jnp.split(x, groups, last if by_feature > 1 else 0),
        jnp.split(kernel, groups, last),
        strict=True,
    )
    made = [
        jax.lax.conv_general_dilated(*part, dimension_numbers=form, **params) for part in parts
    ]
    where = _channels_last(axes.out_spec)
    order = [where.index(axis) for axis in range(x.ndim)]
    return jnp.transpose(jnp.concatenate(made, last), order)


def _padded(x: jax.Array, params: dict[str, Any]) -> jax.Array:
    """The input with its padding and dilation, which are taken out of the parameters.

    Where a kernel is larger than what it slides over, the compiler changes their places, which
    gives another slow form. The barrier keeps it from taking the padding back.
    """
    pads = zip(params["padding"], params["lhs_dilation"], strict=True)
    edges = [(0, 0, 0), *((low, high, every - 1) for (low, high), every in pads), (0, 0, 0)]
    params["padding"] = ((0, 0),) * len(params["padding"])
    params["lhs_dilation"] = (1,) * len(params["padding"])
    return jax.lax.optimization_barrier(jax.lax.pad(x, jnp.zeros((), x.dtype), edges))


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    """The axes of rows, positions and channels, in this order; spec: rows, channels, positions."""
    rows, channels, *positions = spec
    return (rows, *positions, channels)
