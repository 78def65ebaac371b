"""The walk over layers: one recurrence, whatever is computed and wherever the weights are.

    carry_{l+1}, out_l = step(carry_l, layer_l, own_l)          for l = start .. stop - 1

An engine (score, decomposition, decoding, ...) is a step: a pytree that is called, its arrays
leaves, its options static. A source is where layers come from: stacked arrays, under `lax.scan`
(GPU, TPU, meshes, differentiable), or one layer after another, each arrays of its own. An engine
knows nothing of sources, a source nothing of engines.

Legend: L layers.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from tuco_jax.core.cache import Cache
from tuco_jax.core.layer import PairLayer, stacked_layers
from tuco_jax.models.pair import Pair

__all__ = [
    "OneByOne",
    "Source",
    "Split",
    "Stacked",
    "Step",
    "advance",
    "as_source",
    "ends_of",
    "source_of",
    "walk",
]

Tree = TypeVar("Tree")
T = TypeVar("T")


class Step(Protocol):
    """(carry, layer, own) -> (carry, out); with a cache own is a pair, the layer's `Held` second.

    own: this layer's part of the walk's inputs. Where there is a cache, `out` is what it is
    written with: M pairs of keys and values.
    """

    def __call__(self, carry: Any, layer: PairLayer, own: Any, /) -> tuple[Any, Any]:
        """One layer."""
        ...


class Source(Protocol):
    """Layers of a pair. one_program: a walk may be part of a larger compiled function."""

    one_program: bool

    @property
    def ends(self) -> Pair:
        """The pair without its layers: embeddings, final norm, head, and both configs."""
        ...

    @property
    def dtype(self) -> Any:
        """Of the layers' matrices, and so of keys and values."""
        ...

    def run(
        self, step: Step, carry: Any, inputs: Any, cache: Cache | None, start: int, stop: int
    ) -> tuple[Any, Any]:
        """What `walk` gives."""
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

    inputs: a tree with layers on axis 0, [L, ...], of which each layer gets its own. Returns the
    last carry and what the step returned at each layer, [stop - start, ...]; with a cache, the
    last carry and the cache with its next columns written.
    """
    depth = source.ends.base_config.depth
    return source.run(step, carry, inputs, cache, start, depth if stop is None else stop)


@struct.dataclass
class Stacked:
    """All layers in arrays with layers on axis 0. A pytree: an argument of compiled functions.

    remat: recompute each layer in a backward pass.
    """

    layers: PairLayer
    ends: Pair
    remat: bool = struct.field(pytree_node=False, default=False)
    one_program = True

    @classmethod
    def of(cls, pair: Pair, *, remat: bool = False) -> "Stacked":
        """The layers of a pair, where they lie."""
        return cls(stacked_layers(pair), ends_of(pair), remat)

    @property
    def dtype(self) -> Any:
        """Of keys and values."""
        return _dtype(self.layers)

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
    every = source.layers, inputs, held

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        layer, own, held = xs
        return step(carry, layer, own if cache is None else (own, held))

    def at(index: jax.Array | int) -> Any:
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
    else:  # indexed, since a part of the stacked arrays would be a copy
        carry, outs = jax.lax.scan(
            lambda carry, i: body(carry, at(i)), carry, jnp.arange(start, stop)
        )
    if cache is None:
        return carry, outs
    # Written after the scan, which only reads the cache: one update in place of all layers.
    return carry, dataclasses.replace(cache, keys_values=cache.write(held, outs))


class OneByOne:
    """Layers that come one after another: a program a step, which all layers share.

    A subclass gives `layers(start, stop)`; a walk over it is a loop of the host's, and no part of
    a compiled function. waits: not to ask for a layer before the one before it has computed, where
    layers take memory.
    """

    one_program = False
    waits = False

    def __init__(self, ends: Pair) -> None:
        self.ends = ends

    def layers(self, start: int, stop: int) -> Iterable[PairLayer]:
        """The layers start .. stop - 1, in order."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """Of keys and values."""
        raise NotImplementedError

    def run(
        self, step: Step, carry: Any, inputs: Any, cache: Cache | None, start: int, stop: int
    ) -> tuple[Any, Any]:
        """As `walk`. A cache's keys and values become a list, a layer's own each, and are donated.

        Each layer's part of the cache is then written in place.
        """
        owns = [None] * (stop - start) if inputs is None else _parts(inputs, start, stop)
        outs = []
        if cache is None:
            for layer, own in zip(self.layers(start, stop), owns, strict=True):
                carry, out = advance(step, carry, layer, own)
                outs.append(out)
                if self.waits:
                    jax.block_until_ready(carry)
            return carry, _stack(*outs) if jax.tree.leaves(outs) else None
        held = cache.keys_values
        if not isinstance(held, list):
            held = _parts(held, 0, self.ends.base_config.depth)
        bare = cache.bare()
        for index, layer in enumerate(self.layers(start, stop)):
            carry, held[start + index] = _one_cached(
                step, carry, layer, owns[index], held[start + index], bare
            )
            if self.waits:
                jax.block_until_ready(carry)
        return carry, dataclasses.replace(cache, keys_values=held)


class Split(OneByOne):
    """Every layer's own arrays, for a pair on one CPU: views, which take no memory.

    One program for all layers takes each layer's weights out of the stacked arrays, and XLA's CPU
    backend copies them to do so: some 4% of a score's time, a third of a decoding step's.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__(ends_of(pair))
        self._layers = _views(stacked_layers(pair))

    @staticmethod
    def fits(pair: Pair) -> bool:
        """Whether all of the pair is on the default device, and that is a CPU."""
        device = jax.devices()[0]
        leaves = jax.tree.leaves(pair)
        if any(isinstance(x, Tracer) for x in leaves):
            return False
        return device.platform == "cpu" and all(x.devices() == {device} for x in leaves)

    @property
    def dtype(self) -> Any:
        """Of keys and values."""
        return _dtype(self._layers[0])

    def layers(self, start: int, stop: int) -> Iterable[PairLayer]:
        """Views, all at hand."""
        return self._layers[start:stop]


def as_source(pair: Pair | Source) -> Source:
    """A source as it is; a pair as stacked layers, which is what pure functions walk over."""
    return Stacked.of(pair) if isinstance(pair, Pair) else pair


def source_of(pair: Pair) -> Source:
    """The quickest source of a pair, by where it lies: the one place where that is decided."""
    return Split(pair) if Split.fits(pair) else Stacked.of(pair)


@jax.jit
def advance(step: Any, carry: Any, layer: PairLayer, own: Any) -> tuple[Any, Any]:
    """One layer of a walk without a cache: a program of its own."""
    return step(carry, layer, own)


@jax.jit(donate_argnums=4)
def _one_cached(
    step: Any, carry: Any, layer: PairLayer, own: Any, held: Any, cache: Cache
) -> tuple[Any, Any]:
    carry, out = step(carry, layer, (own, held))
    return carry, cache.write(held, out)


@jax.jit
def _stack(*trees: Tree) -> Tree:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *trees)


@jax.jit(static_argnums=(1, 2))
def _parts(tree: Any, start: int, stop: int) -> list[Any]:
    """A tree [L, ...] as a list, a layer each."""
    return [jax.tree.map(lambda a: a[i], tree) for i in range(start, stop)]  # noqa: B023


def _dtype(layer: PairLayer) -> Any:
    return layer.params["attention"]["k"]["kernel"].dtype


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
