"""A whole computation along the layers, stated once: for one carry, or for many.

    carry, state = begin          what comes before the layers
    carry, outs = walk(...)       each phase: one step over some of the layers
    result = finish               what comes after them

`run` walks one carry over any source. `run_each` takes many through each layer before the next
one is taken, so that layers that stream are read once.

Legend: L layers.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from tuco_jax.core.carry_store import CarryStore
from tuco_jax.core.walk import Source, Step, advance, each_layer, walk
from tuco_jax.models.pair import Pair

__all__ = ["Engine", "Phase", "run", "run_each"]


class Phase(NamedTuple):
    """A step over the layers start .. stop - 1. inputs: as of `walk`, [L, ...]."""

    step: Step
    start: int
    stop: int
    inputs: Any = None


class Engine(Protocol):
    """A pytree: the inputs of one computation are leaves, its options static.

    All but `phases` run inside compiled functions; ends: the pair without its layers.
    """

    def state(self, ends: Pair) -> Any:
        """What steps need beside the carry, such as places; `run_each` computes it anew."""
        ...

    def begin(self, ends: Pair, state: Any) -> Any:
        """The carry before the first layer."""
        ...

    def phases(self, state: Any, depth: int) -> Sequence[Phase]:
        """The steps of all layers 0 .. depth - 1, in order; phases of no layers are left out."""
        ...

    def finish(self, ends: Pair, carry: Any, outs: Sequence[Any]) -> Any:
        """The result. outs: what the steps of each phase returned, [stop - start, ...]."""
        ...


def run(engine: Engine, source: Source) -> Any:
    """The result of an engine over the layers of a source."""
    ends = source.ends
    carry, state = _begin(engine, ends)
    outs = []
    for step, start, stop, inputs in engine.phases(state, ends.base_config.depth):
        carry, own = walk(step, carry, source, inputs, start=start, stop=stop)
        outs.append(own)
    return _finish(engine, ends, carry, outs)


def run_each(
    engines: Sequence[Engine],
    source: Source,
    carries: CarryStore,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Iterator[Any]:
    """`run` of many engines: all go through a layer before the next one is taken.

    carries: room for one of each; their states are computed anew at every layer. on_step: called
    after each step with the phase's number, the engine's, and the seconds of the call, which
    include compilation, but not computation.

    Yields each result, on the host, after all of them went through the last layer.
    """
    ends = source.ends
    depth = ends.base_config.depth
    for number, engine in enumerate(engines):
        carries[number], _ = _begin(engine, ends)

    def visit(index: int, layer: Any) -> list[Any]:
        outs = []
        for number, engine in enumerate(engines):
            phases = engine.phases(_state(engine, ends), depth)
            phase = _number(phases, index)
            carry = carries[number]
            own = jax.tree.map(lambda a: a[index], phases[phase].inputs)
            began = time.perf_counter()
            carries[number], out = advance(phases[phase].step, carry, layer, own)
            outs.append(out)
            if on_step is not None:
                on_step(phase, number, time.perf_counter() - began)
        outs = jax.device_get(outs)
        carries.settle()
        return outs

    by_layer = each_layer(source, 0, depth, visit)
    for number, engine in enumerate(engines):
        outs = []
        for _, start, stop, _ in engine.phases(_state(engine, ends), depth):
            own = [layer[number] for layer in by_layer[start:stop]]
            outs.append(jax.tree.map(lambda *parts: np.stack(parts), *own))
        yield jax.device_get(_finish(engine, ends, carries[number], outs))


def _number(phases: Sequence[Phase], index: int) -> int:
    """The number of the phase that a layer belongs to."""
    return next(i for i, phase in enumerate(phases) if phase.start <= index < phase.stop)


@jax.jit
def _state(engine: Any, ends: Pair) -> Any:
    return engine.state(ends)


@jax.jit
def _begin(engine: Any, ends: Pair) -> tuple[Any, Any]:
    """The first carry, and the state."""
    state = engine.state(ends)
    return engine.begin(ends, state), state


@jax.jit
def _finish(engine: Any, ends: Pair, carry: Any, outs: list[Any]) -> Any:
    return engine.finish(ends, carry, outs)
