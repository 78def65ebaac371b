"""One layer of a pair: the only place where base, tuned and low-rank weights meet.

Legend: B rows, T tokens, C wanted tokens of a row, D residual width, K key/value heads, h head
width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import struct

from tuco_jax.core.places import At
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, merge, variables
from tuco_jax.models.layers import (
    Delta,
    KeysValues,
    LayerInfo,
    Positions,
    Variables,
    block_delta,
    block_keys_values,
    layer_infos,
    whole_block,
)
from tuco_jax.models.pair import Pair

__all__ = ["Half", "PairLayer", "stacked_layers"]

Join = Callable[[KeysValues], KeysValues]  # a block's own keys and values -> all that it may see


class Half(NamedTuple):
    """One model of the pair at one layer: a block f(., l) with its weights."""

    config: ModelConfig
    weights: Variables
    info: LayerInfo

    def whole(self, x: jax.Array, at: At) -> Delta:
        """What the block adds at every token of x [B, T, D], which attend to one another."""
        return whole_block(self.config, self.weights, x, at.query, self.info)

    def keys_values(self, x: jax.Array, at: At) -> KeysValues:
        """Keys and values of x [B, T, D]: two arrays [B, K, T, h]."""
        return block_keys_values(self.config, self.weights, x, at.query, self.info)

    def wanted(
        self, last: jax.Array, x: jax.Array, at: At, join: Join | None = None
    ) -> tuple[Delta, KeysValues]:
        """What the block adds at the wanted tokens alone, `last` [B, C, D] of x [B, T, D].

        join: what they attend to besides x's own keys and values, as in `following`.
        """
        assert at.wanted is not None
        own = self.keys_values(x, at)
        return self._added(last, own if join is None else join(own), at.wanted, at), own

    def following(self, x: jax.Array, at: At, join: Join) -> tuple[Delta, KeysValues]:
        """What the block adds at every token of x [B, T, D], which follow others in a cache.

        join: adds x's own keys and values, which are returned, too, to those of the cache.
        """
        own = self.keys_values(x, at)
        return self._added(x, join(own), at.query, at), own

    def _added(self, x: jax.Array, seen: KeysValues, query: Positions, at: At) -> Delta:
        return block_delta(self.config, self.weights, x, seen, query, at.key, self.info)


@struct.dataclass
class PairLayer:
    """One layer of a pair, or all of them, leaves with layers on axis 0.

    params: the base's. changed: the leaves in which the tuned model differs. lora: low-rank
    factors. infos: what else differs by layer, (base's, tuned's). configs: (base's, tuned's).
    """

    params: Params
    changed: Params
    lora: Params
    infos: tuple[LayerInfo, LayerInfo]
    configs: tuple[ModelConfig, ModelConfig] = struct.field(pytree_node=False)

    @property
    def base(self) -> Half:
        """PT's block."""
        return Half(self.configs[0], {"params": self.params}, self.infos[0])

    @property
    def tuned(self) -> Half:
        """FT's block. What an adapter shares with its base is one operand: computed once."""
        weights = variables(merge(self.params, self.changed), self.lora)
        return Half(self.configs[1], weights, self.infos[1])


def stacked_layers(pair: Pair) -> PairLayer:
    """All layers of a pair."""
    configs = pair.base_config, pair.tuned_config
    return PairLayer(
        pair.base["layers"],
        pair.tuned.get("layers", {}),
        pair.lora.get("layers", {}),
        (layer_infos(configs[0]), layer_infos(configs[1])),
        configs,
    )
