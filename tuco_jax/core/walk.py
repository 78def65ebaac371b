"""The walk over layers: one recurrence, whatever is computed and wherever the weights are.

    carry_{l+1}, out_l = step(carry_l, layer_l, own_l)          for l = start .. stop - 1

An engine (score, decomposition, decoding, ...) is a step: a callable pytree, its arrays leaves and
its options static. A source gives the layers: stacked arrays, under `lax.scan` (GPU, TPU, meshes,
differentiable), or one layer after another, each with its own arrays. An engine does not depend on
the source, nor a source on the engine.

Legend: L layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Int

from common_jax import struct
from tuco_jax.core.cache import Cache
from tuco_jax.core.layer import PairLayer, stacked_layers
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import place

__all__ = [
    "OneByOne",
    "Source",
    "Split",
    "Stacked",
    "Step",
    "advance",
    "as_source",
    "each_layer",
    "ends_of",
    "program",
    "source_of",
    "walk",
]

Tree = TypeVar("Tree")
T = TypeVar("T")


class Step(Protocol):
    """(carry, layer, own) -> (carry, out).

    own: this layer's part of the walk's inputs; with a cache, the pair of that and the cache with
    this layer's keys and values. Then `out` are those to be written to it, M pairs.
    """

    def __call__(self, carry: Any, layer: PairLayer, own: Any, /) -> tuple[Any, Any]:
        """One layer."""
        ...


class Source(Protocol):
    """Layers of a pair.

    one_program: whether a walk may be part of a compiled function. streams: whether layers are
    read while the walk goes on, so that many batches should go through each (`engine.py`).
    """

    one_program: bool
    streams: bool

    @property
    def ends(self) -> Pair:
        """The pair without its layers: embeddings, final norm, head, and both configs."""
        ...

    def layers(self, start: int, stop: int) -> Iterable[PairLayer]:
        """The layers start .. stop - 1, in order, each with its own arrays."""
        ...

    def run(
        self, step: Step, carry: Any, inputs: Any, cache: Cache | None, start: int, stop: int
    ) -> tuple[Any, Any]:
        """As `walk`."""
        ...


def walk(
    step: Step,
    carry: T,
    source: Source,
    inputs: Any = None,
    *,
    cache: Cache | None = None,
    start: int = 0,
    stop: int | None = None,
) -> tuple[T, Any]:
    """Run a step over the layers start .. stop - 1 of a source.

    inputs: a tree of arrays with layers on axis 0, of which each step gets its layer's part.
    Returns the last carry and what the steps returned, stacked, [stop - start, ...]; with a cache,
    the last carry and the cache with its next columns written.
    """
    depth = source.ends.base_config.depth
    step = struct.apart(step)
    return source.run(step, carry, inputs, cache, start, depth if stop is None else stop)


@struct.dataclass
class Stacked:
    """All layers in arrays with layers on axis 0. A pytree: an argument of compiled functions.

    remat: recompute each layer in a backward pass.
    """

    stacked: PairLayer
    ends: Pair
    remat: bool = struct.field(pytree_node=False, default=False)
    one_program = True
    streams = False

    @classmethod
    def of(cls, pair: Pair, *, remat: bool = False) -> "Stacked":
        """The layers of a pair, not copied."""
        return cls(stacked_layers(pair), ends_of(pair), remat)

    def layers(self, start: int, stop: int) -> Iterator[PairLayer]:
        """Copies, one after another; what a walk does not need."""
        # A map, which holds no layer while waiting for the next one.
        return map(functools.partial(_layer, self.stacked), np.arange(start, stop, dtype=np.int32))

    def run(
        self, step: Step, carry: Any, inputs: Any, cache: Cache | None, start: int, stop: int
    ) -> tuple[Any, Any]:
        """As `walk`; differentiable."""
        return _run_stacked(self, step, carry, inputs, cache, start=start, stop=stop)


@jax.jit(static_argnames=("start", "stop"))
def _run_stacked(
    source: Stacked,
    step: Any,
    carry: Any,
    inputs: Any,
    cache: Cache | None,
    *,
    start: int,
    stop: int,
) -> tuple[Any, Any]:
    held = None if cache is None else cache.keys_values
    every = source.stacked, inputs, held

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        layer, own, held = xs
        return step(carry, layer, own if cache is None else (own, cache.of_layer(held)))

    def at(index: Int[Array, ""] | int) -> Any:
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), every
        )

    if source.remat:
        body = jax.checkpoint(body)
    if stop - start == 1:
        carry, out = body(carry, at(start))
        outs = jax.tree.map(lambda a: a[None], out)
    elif (start, stop) == (0, source.ends.base_config.depth):
        carry, outs = jax.lax.scan(body, carry, every)
    else:  # indexed, since a slice of the stacked arrays would be a copy
        carry, outs = jax.lax.scan(
            lambda carry, i: body(carry, at(i)), carry, jnp.arange(start, stop)
        )
    if cache is None:
        return carry, outs
    # Written after the scan, which only reads the cache: one update in place of all layers.
    return carry, dataclasses.replace(cache, keys_values=cache.write(held, outs))


class OneByOne:
    """Layers one after another: the step is one program, which all layers share.

    A subclass gives `layers(start, stop)`; a walk over it is a loop on the host, and cannot be
    part of a compiled function. Where layers stream, each has been computed before the next one
    is taken, since layers take memory.
    """

    one_program = False
    streams = False

    def __init__(self, ends: Pair) -> None:
        self.ends = ends

    def layers(self, start: int, stop: int) -> Iterable[PairLayer]:
        """The layers start .. stop - 1, in order."""
        raise NotImplementedError

    def run(
        self, step: Step, carry: Any, inputs: Any, cache: Cache | None, start: int, stop: int
    ) -> tuple[Any, Any]:
        """As `walk`. A cache's keys and values become a list by layer, and are donated.

        Each layer's part of the cache is then written in place.
        """
        owns = None if inputs is None else _parts(inputs, start, stop)
        held: Any = None if cache is None else cache.keys_values
        if cache is not None and not isinstance(held, list):
            held = _parts(held, 0, self.ends.base_config.depth)
        bare = None if cache is None else cache.bare()

        def visit(index: int, layer: PairLayer) -> Any:
            nonlocal carry
            own, out = None if owns is None else owns[index - start], None
            if bare is None:
                carry, out = advance(step, carry, layer, own)
            else:
                one = program(layer, cached=True)
                carry, held[index] = one(step, carry, layer, own, held[index], bare)
            if self.streams:
                jax.block_until_ready(carry)
            return out

        outs = each_layer(self, start, stop, visit)
        if cache is not None:
            return carry, dataclasses.replace(cache, keys_values=held)
        return carry, _stack(*outs) if jax.tree.leaves(outs) else None


def each_layer(
    source: Source, start: int, stop: int, visit: Callable[[int, PairLayer], Tree]
) -> list[Tree]:
    """What `visit` returns for each layer and its index: the loop over layers on the host."""
    outs = []
    for layer in source.layers(start, stop):
        outs.append(visit(start + len(outs), layer))
        del layer  # before the next one is waited for
    return outs


class Split(OneByOne):
    """Each layer with arrays of its own, for a pair on one CPU: views, which take no memory.

    A scan takes each layer's weights out of the stacked arrays, and XLA's CPU backend copies them
    to do so: some 4% of a score's time, a third of a decoding step's.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__(ends_of(pair))
        self._layers = _views(stacked_layers(pair))

    @staticmethod
    def fits(pair: Pair) -> bool:
        """Whether all of the pair is on the default device, and this is a CPU."""
        device = jax.devices()[0]
        leaves = jax.tree.leaves(pair)
        if any(isinstance(x, Tracer) for x in leaves):
            return False
        return device.platform == "cpu" and all(x.devices() == {device} for x in leaves)

    def layers(self, start: int, stop: int) -> Iterable[PairLayer]:
        """Views of the stacked arrays."""
        return self._layers[start:stop]


def as_source(pair: Pair | Source, *, remat: bool = False) -> Source:
    """A source as it is; a pair as stacked layers, the source of pure functions.

    remat: of the stacked layers.
    """
    return Stacked.of(pair, remat=remat) if isinstance(pair, Pair) else pair


def source_of(pair: Pair | Source, mesh: Mesh | None = None) -> Source:
    """A source as it is; of a pair the quickest one, chosen here alone.

    It depends on the devices that the pair is on. mesh: one that the pair is to be sharded over,
    if it is not yet.
    """
    if not isinstance(pair, Pair):
        return pair
    if mesh is not None:
        return Stacked.of(place(pair, mesh))
    return Split(pair) if Split.fits(pair) else Stacked.of(pair)


def advance(step: Any, carry: Any, layer: PairLayer, own: Any) -> tuple[Any, Any]:
    """One layer of a walk without a cache, as a compiled program."""
    return program(layer)(step, carry, layer, own)


def program(layer: PairLayer, *, cached: bool = False) -> Any:
    """The compiled function that `advance` is for such a layer; cached: of a walk with a cache."""
    by_parts = any(config.precision in ("bfloat16x3", "bfloat16x2") for config in layer.configs)
    if by_parts and jax.default_backend() == "cpu":
        return _fusing(cached)
    return _one_cached if cached else _advance


def _step(step: Any, carry: Any, layer: PairLayer, own: Any) -> tuple[Any, Any]:
    return step(carry, layer, own)


def _cached_step(
    step: Any, carry: Any, layer: PairLayer, own: Any, held: Any, cache: Cache
) -> tuple[Any, Any]:
    # The very cache that the step joins to: only then does XLA see that it is written once.
    carry, out = step(carry, layer, (own, cache.of_layer(held)))
    return carry, cache.write(held, out)


_advance = jax.jit(_step)
_one_cached = jax.jit(_cached_step, donate_argnums=4)


@functools.cache
def _fusing(cached: bool) -> Any:
    """`_advance` or `_one_cached`, products of parts, their sums and what follows in one pass.

    XLA's CPU backend otherwise writes each part's product to memory, and fetches pages for them
    anew in every call (237,000 of a score at three parts): float32's time / three parts' .81
    without, 1.19 with it (Intel, AMX). An option that a newer XLA lacks is left out. In a scan
    over stacked layers it does not help (.92), so there "auto" takes float32.
    """
    kinds = ("INDIVIDUAL_DOT", "REDUCE", "ELTWISE")
    option = ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds)
    options: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": option}
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return _one_cached if cached else _advance
    if cached:
        return jax.jit(_cached_step, donate_argnums=4, compiler_options=options)
    return jax.jit(_step, compiler_options=options)


@jax.jit
def _layer(stacked: PairLayer, index: Int[np.ndarray, ""]) -> PairLayer:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stacked)


@jax.jit
def _stack(*trees: Tree) -> Tree:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *trees)


@jax.jit(static_argnums=(1, 2))
def _parts(tree: Any, start: int, stop: int) -> list[Any]:
    """A tree of arrays [L, ...] as a list of one tree for each layer start .. stop - 1."""
    return [jax.tree.map(lambda a: a[i], tree) for i in range(start, stop)]  # noqa: B023


def _views(stacked: PairLayer) -> list[PairLayer]:
    host = jax.tree.map(np.asarray, stacked)
    return [
        jax.tree.map(lambda x: jax.device_put(x[index]), host)  # noqa: B023
        for index in range(len(jax.tree.leaves(host)[0]))
    ]


def ends_of(pair: Pair) -> Pair:
    """The pair without its layers."""

    def without(params: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in params.items() if name != "layers"}

    return dataclasses.replace(
        pair, base=without(pair.base), tuned=without(pair.tuned), lora=without(pair.lora)
    )
