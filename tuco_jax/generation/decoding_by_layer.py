"""Decoding a layer at a time: how tokens are generated on a CPU.

A step of decoding does little more than read the weights. One program for all layers takes each
layer's out of the stacked arrays, and XLA's CPU backend copies them to do so: a third of the time.
Here a layer's weights are arrays of their own, views that take no memory, one program serves all
layers, and a layer's cache is written in place.

Legend: B batch, D residual width, L layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from tuco_jax.core.by_layer import outside, split
from tuco_jax.generation.decoding import (
    Places,
    Progress,
    Request,
    add_layer,
    any_going,
    decoding_layers,
    emit,
    latest,
    places,
)
from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.pair import Pair

__all__ = ["ResumeByLayer"]


class ResumeByLayer:
    """`decoding.resume` of a pair on one CPU; `steered`: both models run."""

    def __init__(self, pair: Pair, *, steered: bool) -> None:
        self._layers = split(decoding_layers(pair, steered=steered))
        self._outside = outside(pair)
        self._configs = pair.tuned_config, pair.base_config

    def __call__(self, request: Request, progress: Progress, steps: int) -> Progress:
        """Decode at most `steps` tokens more, until every row is done. `progress` is used up."""
        depth = len(self._layers)
        held = [jax.tree.map(lambda a: a[i], progress.cache.keys_values) for i in range(depth)]  # noqa: B023
        alphas: Any = [None] * depth if request.alpha is None else list(request.alpha)
        kept = jax.tree.structure(progress.cache.keys_values)
        small = _without_keys(progress)
        for _ in range(steps):
            if not bool(_any_going(request, small)):
                break
            x, at = _start(self._outside, small)
            for i, layer in enumerate(self._layers):
                x, held[i] = _layer(self._configs, x, layer, alphas[i], held[i], at)
            small = _end(self._outside, request, small, x)
        leaves = zip(*(jax.tree.leaves(one) for one in held), strict=True)
        keys_values = jax.tree.unflatten(kept, [jnp.stack(parts) for parts in leaves])
        cache = dataclasses.replace(small.cache, keys_values=keys_values)
        return dataclasses.replace(small, cache=cache)


def _without_keys(progress: Progress) -> Progress:
    cache = dataclasses.replace(progress.cache, keys_values=())
    return dataclasses.replace(progress, cache=cache)


_any_going = jax.jit(any_going)


@jax.jit
def _start(pair: Pair, progress: Progress) -> tuple[jax.Array, Places]:
    """The stream before the first layer, [B, 1, D]; of the pair no layers are needed."""
    at = places(pair, progress.cache, 1)
    return decoder.embed(pair.tuned_config, pair.tuned_params, latest(progress), at.tuned), at


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _layer(
    configs: tuple[ModelConfig, ModelConfig],
    x: jax.Array,
    layer: Any,
    alpha: jax.Array | None,
    held: Any,
    at: Places,
) -> tuple[jax.Array, Any]:
    x, _, held = add_layer(configs, x, layer, alpha, held, at)
    return x, held


@jax.jit
def _end(pair: Pair, request: Request, progress: Progress, x: jax.Array) -> Progress:
    cache = dataclasses.replace(progress.cache, filled=progress.cache.filled + 1)
    return emit(pair, request, dataclasses.replace(progress, cache=cache), x)
