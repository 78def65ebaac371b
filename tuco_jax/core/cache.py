"""Keys and values of what the pair has read: of each row, or of a prefix that all rows share.

Legend: M models (1 or 2, the tuned one first), L layers, B rows, S columns, P tokens of a shared
prefix, T tokens given at once, K key/value heads, h head width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tuco_jax.models.config import ModelConfig
from tuco_jax.models.layers import KeysValues, Positions
from tuco_jax.models.pair import Pair

__all__ = ["Cache", "Held"]

Held = Sequence[KeysValues]  # of one layer, a pair for each of M models


@struct.dataclass
class Cache:
    """What the blocks have seen, and where it stands.

    keys_values: M pairs of arrays with layers on axis 0, or a list of L times M pairs, a layer's
    own. Of each row [.., B, K, S, h], or, where `shared`, of a prefix [.., K, P, h].
    at: index and mask of the columns, [B, S] or [1, P]; a column not yet written has a later
    position than any query. filled: how many columns are written.
    """

    keys_values: Any
    at: Positions
    filled: jax.Array
    shared: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(cls, ends: Pair, mask: jax.Array, room: int, *, both: bool, dtype: Any) -> "Cache":
        """For right-padded prompts `mask` [B, P] and `room` new tokens a row: S = P + room.

        Every row writes its j-th new token in column P + j, at its own position (its length + j).
        both: of both models, not of the tuned one alone. dtype: of the weights.
        """
        rows = mask.shape[0]
        index = jnp.concatenate(
            [jnp.cumsum(mask, axis=1) - 1, mask.sum(axis=1)[:, None] + jnp.arange(room)[None]],
            axis=1,
        )
        mask = jnp.concatenate([mask.astype(bool), jnp.ones((rows, room), bool)], axis=1)

        def one(config: ModelConfig) -> KeysValues:
            shape = config.depth, rows, config.kv_heads, mask.shape[1], config.head_dim
            return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

        models = [ends.tuned_config, ends.base_config] if both else [ends.tuned_config]
        held = tuple(map(one, models))
        return cls(held, Positions(index, mask, None, None, None), jnp.int32(0))

    @classmethod
    def prefix(cls, keys_values: Any, mask: jax.Array) -> "Cache":
        """Of a prefix that all rows share; mask [P]: what of it is real."""
        index = jnp.cumsum(mask)[None] - 1
        at = Positions(index, mask.astype(bool)[None], None, None, None)
        return cls(keys_values, at, jnp.sum(mask), shared=True)

    @property
    def length(self) -> int:
        """Columns of a shared prefix, P, or of a row, S."""
        return self.at.index.shape[1]

    def bare(self) -> "Cache":
        """Without its keys and values: what a step needs to know of where they stand."""
        return dataclasses.replace(self, keys_values=())

    def join(self, held: KeysValues, own: KeysValues) -> KeysValues:
        """What tokens attend to, [B, K, .., h]: held of one layer, and their own [B, K, T, h]."""
        if not self.shared:
            return self.write(held, own)
        keys, values = (
            jnp.concatenate([jnp.broadcast_to(old, (len(new), *old.shape)), new], axis=-2)
            for old, new in zip(held, own, strict=True)
        )
        return keys, values

    def write(self, held: Any, own: Any) -> Any:
        """A tree of [.., S, h] with columns [.., T, h] from `filled` on."""
        return jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new.astype(old.dtype), self.filled, axis=old.ndim - 2
            ),
            held,
            own,
        )
