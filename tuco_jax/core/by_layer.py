"""The last-token form of TuCo a layer at a time: how scores are computed on a CPU.

One program for all layers takes each layer's weights out of the stacked arrays, and XLA's CPU
backend copies them to do so, which is some 4% of a score's time. Here a layer's weights are arrays
of their own, views that take no memory, and one program serves all layers but the last.

Legend: B batch, T tokens, D residual width, L layers.
"""

import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tuco_jax.core.decompose import (
    Carry,
    Layers,
    Places,
    advance,
    begin,
    finish,
    stacked_layers,
)
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params
from tuco_jax.models.pair import Pair

__all__ = ["ByLayer", "Result", "outside", "split"]

Tree = TypeVar("Tree")
Result = tuple[jax.Array, jax.Array, jax.Array]  # tuco [B], layers [B, L], telescoping [B]


class ByLayer:
    """`decompose.last_token` of a pair on one CPU, as a function of tokens and mask."""

    def __init__(self, pair: Pair, norm: int = 1) -> None:
        self._layers = split(stacked_layers(pair))
        self._outside = outside(pair)
        self._configs = pair.base_config, pair.tuned_config
        self._norm = norm

    @staticmethod
    def fits(pair: Pair) -> bool:
        """Whether all of the pair is on the default device, and that is a CPU."""
        device = jax.devices()[0]
        leaves = jax.tree.leaves(pair)
        return device.platform == "cpu" and all(x.devices() == {device} for x in leaves)

    def __call__(self, tokens: np.ndarray, mask: np.ndarray) -> Result:
        """Scores of tokens [B, T] int32, mask [B, T] bool; returns before they are computed."""
        carry, places = _begin(self._outside, tokens, mask)
        betas = []
        for layer in self._layers[:-1]:
            carry, beta = _middle(self._configs, carry, layer, places, norm=self._norm)
            betas.append(beta)
        return _last(self._configs, self._norm, carry, self._layers[-1], places, betas)


_begin = jax.jit(begin)
_middle = jax.jit(functools.partial(advance, full=True), static_argnums=0, static_argnames="norm")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _last(
    configs: tuple[ModelConfig, ModelConfig],
    norm: int,
    carry: Carry,
    layer: Layers,
    places: Places,
    betas: list[jax.Array],
) -> Result:
    """The last layer and the result; betas, [B] each, of the layers before."""
    carry, beta = advance(configs, carry, layer, places, full=False, norm=norm)
    out = finish(carry, jnp.stack([*betas, beta]))
    return out.tuco, out.layers.T, out.telescoping


def split(stacked: Tree) -> list[Tree]:
    """Each layer's own arrays, of leaves with layers on axis 0: views, where all is on one CPU."""
    host = jax.tree.map(np.asarray, stacked)
    return [
        jax.tree.map(lambda x: jax.device_put(x[index]), host)  # noqa: B023
        for index in range(len(jax.tree.leaves(host)[0]))
    ]


def outside(pair: Pair) -> Pair:
    """The pair without its layers."""
    return dataclasses.replace(
        pair,
        base=_without_layers(pair.base),
        tuned=_without_layers(pair.tuned),
        lora=_without_layers(pair.lora),
    )


def _without_layers(params: Params) -> Params:
    return {name: value for name, value in params.items() if name != "layers"}
