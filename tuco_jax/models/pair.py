"""A pre-trained model and what tuning made of it, as one frozen pytree."""

import dataclasses
from typing import Any

from common_jax import struct
from tuco_jax.models.config import ModelConfig, Precision
from tuco_jax.models.decoder import Params, merge

__all__ = ["Notes", "Pair", "single"]


class Notes(tuple):
    """Remarks about a pair, as texts. All are equal to jit: a remark never recompiles."""

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Notes)

    def __hash__(self) -> int:
        return 0


@struct.dataclass
class Pair:
    """PT ("base") and FT ("tuned") of the TuCo paper; the base's weights are held once.

    base: the base's parameters (`models/decoder.py` gives the tree). tuned: the leaves in which
    the tuned model differs; the whole tree for a full fine-tune, what `modules_to_save` replaced
    (for most adapters nothing). lora: an adapter's low-rank factors, ranks padded to the
    largest, zeros for untouched layers. The configs are static and hashable.
    """

    base: Params
    tuned: Params
    lora: Params
    base_config: ModelConfig = struct.field(pytree_node=False)
    tuned_config: ModelConfig = struct.field(pytree_node=False)
    notes: Notes = struct.field(pytree_node=False, default=Notes())

    @property
    def context(self) -> int:
        """The longest row, in tokens, that both models can read."""
        return min(self.base_config.max_positions, self.tuned_config.max_positions)

    @property
    def precision(self) -> Precision:
        """How products of both models take activations."""
        return self.tuned_config.precision

    def at(self, precision: Precision) -> "Pair":
        """The pair with products of that precision; weights are shared."""
        base, tuned = (
            dataclasses.replace(config, precision=precision)
            for config in (self.base_config, self.tuned_config)
        )
        return dataclasses.replace(self, base_config=base, tuned_config=tuned)

    @property
    def tuned_params(self) -> Params:
        """The tuned model's parameters, without `lora`; leaves shared with the base are shared."""
        params = merge(self.base, self.tuned)
        if self.tuned_config.tied_head and "head" in params:  # a head that the base alone has
            params = {name: value for name, value in params.items() if name != "head"}
        return params


def single(config: ModelConfig, params: Params, lora: Params | None = None) -> Pair:
    """One model as a pair of itself: at alpha 1, generation runs it alone."""
    return Pair(params, {}, lora or {}, config, config)
