"""One layer of a pair: the only place where base, tuned and low-rank weights meet.

Legend: B rows, T tokens, C selected tokens of a row, D residual width.
"""

from typing import NamedTuple

from jaxtyping import Array, Float

from common_jax import struct
from tuco_jax.core.cache import Join
from tuco_jax.core.places import ModelPlaces
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, merge, variables
from tuco_jax.models.layers import (
    Delta,
    KeysValues,
    Variables,
    block_delta,
    block_keys_values,
    whole_block,
)
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import LayerInfo, Positions, layer_infos

__all__ = ["ModelLayer", "PairLayer", "stacked_layers"]


class ModelLayer(NamedTuple):
    """One model of the pair at one layer: a block f(., l) with its weights."""

    config: ModelConfig
    weights: Variables
    info: LayerInfo

    def whole(self, x: Float[Array, "B T D"], at: ModelPlaces) -> Delta:
        """What the block adds at every token of x, which attend to one another."""
        return whole_block(self.config, self.weights, x, at.query, self.info)

    def keys_values(self, x: Float[Array, "B T D"], at: ModelPlaces) -> KeysValues:
        """Rotated keys, and values, at every token of x."""
        return block_keys_values(self.config, self.weights, x, at.query, self.info)

    def selected(
        self,
        last: Float[Array, "B C D"],
        x: Float[Array, "B T D"],
        at: ModelPlaces,
        join: Join | None = None,
    ) -> tuple[Delta, KeysValues]:
        """What the block adds at the selected tokens alone; and keys and values of x.

        last: the selected tokens of x. join: as in `following`; None: they attend to x alone.
        """
        assert at.selected is not None
        own = self.keys_values(x, at)
        return self._added(last, own if join is None else join(own), at.selected, at), own

    def following(
        self, x: Float[Array, "B T D"], at: ModelPlaces, join: Join | None = None
    ) -> tuple[Delta, KeysValues]:
        """What the block adds at every token of x, which follow those of a cache.

        Returns x's own keys and values, too. join: adds them to those of the cache; None: there is
        no cache.
        """
        own = self.keys_values(x, at)
        return self._added(x, own if join is None else join(own), at.query, at), own

    def added(
        self,
        x: Float[Array, "B T D"],
        at: ModelPlaces,
        *,
        last: Float[Array, "B C D"] | None = None,
        join: Join | None = None,
    ) -> Delta:
        """What one of the above adds: `selected` with `last`, `following` with `join`, `whole`."""
        if last is not None:
            return self.selected(last, x, at, join)[0]
        return self.whole(x, at) if join is None else self.following(x, at, join)[0]

    def _added(
        self, x: Float[Array, "B Q D"], seen: KeysValues, query: Positions, at: ModelPlaces
    ) -> Delta:
        return block_delta(self.config, self.weights, x, seen, query, at.key, self.info)


@struct.dataclass
class PairLayer:
    """One layer of a pair, or all of them, leaves with layers on axis 0.

    params: the base's. changed: the leaves in which the tuned model differs. lora: low-rank
    factors. infos: rotary tables and windows, (base's, tuned's). configs: (base's, tuned's).
    """

    params: Params
    changed: Params
    lora: Params
    infos: tuple[LayerInfo, LayerInfo]
    configs: tuple[ModelConfig, ModelConfig] = struct.field(pytree_node=False)

    @property
    def base(self) -> ModelLayer:
        """PT's block."""
        return ModelLayer(self.configs[0], {"params": self.params}, self.infos[0])

    @property
    def tuned(self) -> ModelLayer:
        """FT's block; a weight shared with the base is one operand, multiplied only once."""
        weights = variables(merge(self.params, self.changed), self.lora)
        return ModelLayer(self.configs[1], weights, self.infos[1])


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
