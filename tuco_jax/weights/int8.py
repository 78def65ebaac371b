"""Matrices of layers as int8: rounded to nearest, with a float32 scale for each output.

    W[.., i, o] ~ Q[.., i, o] s[.., o],    s = max over i of |W| / 127,    |W - Q s| <= s / 2

In a tree of parameters a "kernel" [.., I, O] then holds Q, and "scale" [.., O] stands beside it:
paths, shapes and shards stay those of the matrix, and a layer is a slice of both. Matrices and
experts' are held so; embedding, head, norms, biases, and routers, whose choices a rounding error
would change, as published.

This is done here, and not by a library such as qwix: those take a model that is loaded and
intercept its modules, while these weights are rounded on the way from disk to their shards, and
multiplied exactly (`models/numerics.py`).

Legend: L layers, E experts, I inputs, O outputs of a matrix.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int8

from common_jax.mesh import fetch_row

__all__ = ["INT8", "Rounded", "abstract", "holds", "numbers", "rounded", "scale_of", "widened"]

INT8 = "int8"  # as a dtype that is asked for
_MOST = 127  # integers are symmetric about 0
_BLOCK = 1 << 22  # numbers of a matrix that are rounded at a time, all inputs of some outputs

Bounds = tuple[tuple[int, int], ...]  # as in `arrays.py`, which reads the numbers
Parts = list[tuple[Bounds, np.ndarray]]


def holds(path: str) -> bool:
    """Whether int8 is for the parameter at a path such as "base/layers/attention/q/kernel"."""
    parts = path.split("/")
    return "layers" in parts and parts[-1] == "kernel" and parts[-2] != "router"


def scale_of(path: str) -> str:
    """The path of the scales that stand beside the kernel at `path`."""
    return f"{path.removesuffix('kernel')}scale"


def rounded(
    matrix: Float[np.ndarray, "*stacked I O"],
) -> tuple[Int8[np.ndarray, "*stacked I O"], Float[np.ndarray, "*stacked O"]]:
    """Integers and scales of finite numbers."""
    wide = matrix.astype(np.float32)
    scale = np.maximum(np.abs(wide).max(axis=-2) / _MOST, np.finfo(np.float32).tiny)
    wide /= scale[..., None, :]
    return np.rint(wide, out=wide).astype(np.int8), scale


class Rounded:
    """A stacked matrix [L, .., I, O] whose numbers `fill` writes, as integers and scales.

    fill: as in `arrays.py`; it is asked for all inputs of some outputs at a time, since these
    have one scale. values, scales: fills of the integers and, once these are filled, of the
    scales, whose outputs must be those of the integers.
    """

    def __init__(self, shape: tuple[int, ...], fill: Callable[[int, Parts], None]) -> None:
        self._shape, self._fill = shape, fill
        self.scale = np.zeros((*shape[:-2], shape[-1]), np.float32)

    def values(self, layer: int, parts: Parts) -> None:
        """Write the integers within bounds of one layer, and keep their scales."""
        for box in self._boxes([bounds for bounds, _ in parts]):
            host = np.empty([stop - start for start, stop in box], np.float32)
            self._fill(layer, [(box, host)])
            integers, scale = rounded(host)
            self.scale[layer][tuple(slice(*ends) for ends in (*box[:-2], box[-1]))] = scale
            for bounds, part in parts:
                both = [
                    (max(a, c), max(min(b, d), max(a, c)))
                    for (a, b), (c, d) in zip(bounds, box, strict=True)
                ]
                here, there = (
                    tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, own, strict=True))
                    for own in (bounds, box)
                )
                part[here] = integers[there]

    def scales(self, layer: int, parts: Parts) -> None:
        """Write the scales within bounds of one layer."""
        for bounds, part in parts:
            part[...] = self.scale[layer][tuple(slice(*ends) for ends in bounds)]

    def _boxes(self, wanted: list[Bounds]) -> Iterator[Bounds]:
        """What is rounded at a time of what is wanted: an expert's inputs of some outputs."""
        *experts, _, outputs = [
            (min(start for start, _ in ends), max(stop for _, stop in ends))
            for ends in zip(*wanted, strict=True)
        ]
        inputs = self._shape[-2]
        step = max(1, _BLOCK // inputs)
        for expert in range(*experts[0]) if experts else (None,):
            for start in range(*outputs, step):
                box = (0, inputs), (start, min(start + step, outputs[1]))
                yield box if expert is None else ((expert, expert + 1), *box)


def numbers(
    params: Mapping[str, Any], path: str, layer: int | None = None
) -> Float[np.ndarray, "..."]:
    """The parameter at a path of a flat tree, on the host; of int8 what it stands for, float32.

    layer: of a stacked one that alone.
    """

    def read(path: str) -> np.ndarray:
        return np.asarray(params[path]) if layer is None else fetch_row(params[path], layer)

    value = read(path)
    return value if value.dtype != np.int8 else value * read(scale_of(path))[..., None, :]


def widened(params: Any) -> Any:
    """A tree of parameters, with each int8 matrix as the float32 numbers that it stands for."""
    if not isinstance(params, dict):
        return params
    kernel = params.get("kernel")
    if kernel is None or kernel.dtype != jnp.int8:
        return {name: widened(value) for name, value in params.items()}
    rest = {name: value for name, value in params.items() if name != "scale"}
    return rest | {"kernel": kernel.astype(jnp.float32) * params["scale"][..., None, :]}


def abstract(params: Any, rest: Any) -> Any:
    """The tree as it is held, of shapes alone (`param_shapes`). rest: dtype of the rest."""
    out: dict[str, Any] = {}
    flat: dict[str, Any] = flatten_dict(params, sep="/")  # pyright: ignore[reportAssignmentType]
    for path, x in flat.items():
        out[path] = jax.ShapeDtypeStruct(x.shape, np.int8 if holds(path) else rest)
        if holds(path):
            out[scale_of(path)] = jax.ShapeDtypeStruct((*x.shape[:-2], x.shape[-1]), np.float32)
    return unflatten_dict(out, sep="/")
