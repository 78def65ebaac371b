"""The key/value cache of a pair: of each row, or of a prefix that all rows share.

Legend: M models (1 or 2, the tuned one first), L layers, B rows, S columns, P tokens of a prompt
or of a shared prefix, G prefixes, T tokens of a step, K key/value heads, h head width.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from common_jax import struct
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.layers import KeysValues
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import Positions

__all__ = ["Ahead", "Cache", "Join", "LayerCache", "behind", "each"]

LayerCache = Sequence[KeysValues]  # what a cache holds of one layer: keys and values of M models
Join = Callable[[KeysValues], KeysValues]  # a block's own keys and values -> all it attends to


@struct.dataclass
class Cache:
    """Keys and values of earlier tokens, and their positions.

    keys_values: M pairs of arrays with layers on axis 0, or a list of M pairs for each of L
    layers: [.., B, K, S, h] of each row, or, where `shared`, [.., K, P, h] of a prefix ([.., B, K,
    P, h] where rows have different ones). at: index and mask of the columns, [B, S], [1, P] or
    [B, P]; a column that is not written yet has a later position than any query. filled: how many
    columns are written, for `write`.
    """

    keys_values: Any
    at: Positions
    filled: Int[Array, ""]
    shared: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(cls, ends: Pair, mask: Shaped[Array, "B P"], room: int, *, both: bool) -> "Cache":
        """A cache for right-padded prompts and `room` new tokens in each row: S = P + room.

        Every row writes its j-th new token in column P + j, at its own position (its length + j).
        both: of both models, not of the tuned one alone.
        """
        rows = mask.shape[0]
        index = jnp.concatenate(
            [jnp.cumsum(mask, axis=1) - 1, mask.sum(axis=1)[:, None] + jnp.arange(room)[None]],
            axis=1,
        )
        mask = jnp.concatenate([mask.astype(bool), jnp.ones((rows, room), bool)], axis=1)

        def one(config: ModelConfig) -> KeysValues:
            shape = config.depth, rows, config.kv_heads, mask.shape[1], config.head_dim
            return jnp.zeros(shape, config.keys_dtype), jnp.zeros(shape, config.keys_dtype)

        models = [ends.tuned_config, ends.base_config] if both else [ends.tuned_config]
        held = tuple(map(one, models))
        return cls(held, Positions(index, mask, None, None, None), jnp.int32(0))

    @classmethod
    def prefix(cls, keys_values: Any, mask: Bool[Array, " P"]) -> "Cache":
        """The cache of a prefix that all rows share; mask: True at its real tokens."""
        index = jnp.cumsum(mask)[None] - 1
        at = Positions(index, mask.astype(bool)[None], None, None, None)
        return cls(keys_values, at, jnp.sum(mask), shared=True)

    def led_by(self, lead: "Cache", follows: Int[Array, " B"]) -> "Cache":
        """This cache, empty yet, its first columns filled with those of another cache's rows.

        lead: of G rows that rows of this one begin with. follows: which of them each row does.
        """
        held = _taken(lead.keys_values, follows, columns=self.at.index.shape[1])
        return dataclasses.replace(self, keys_values=held, filled=lead.filled)

    def bare(self) -> "Cache":
        """The cache without its keys and values: their positions, all that a step needs."""
        return dataclasses.replace(self, keys_values=())

    def of_layer(self, held: LayerCache) -> "Cache":
        """The cache with the keys and values of one layer alone."""
        return dataclasses.replace(self, keys_values=held)

    def join(self, held: KeysValues, own: KeysValues) -> KeysValues:
        """All that tokens attend to in one layer: what the cache holds, and their own."""
        return behind(held, own) if self.shared else self.write(held, own)

    def write(self, held: Any, own: Any) -> Any:
        """A tree of [.., S, h], the columns [.., T, h] written into it from `filled` on."""
        return jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new.astype(old.dtype), self.filled, axis=old.ndim - 2
            ),
            held,
            own,
        )


@struct.dataclass
class Ahead:
    """Keys and values of some prefixes at one layer, M pairs of [G, K, P, h].

    follows: the prefix of each row.
    """

    seen: LayerCache
    follows: Int[Array, " B"]

    def join(self, model: int) -> Join:
        """Puts rows' own keys and values of a model, by number, behind those of their prefixes."""
        held = jax.tree.map(lambda a: each(a, self.follows), self.seen[model])
        return functools.partial(behind, held)


@functools.partial(jax.jit, static_argnames="columns")
def _taken(held: Any, follows: Int[Array, " B"], *, columns: int) -> Any:
    """A tree of [.., G, K, P, h] as [.., B, K, columns, h], zeros behind the first P."""

    def one(a: Shaped[Array, "*L G K P h"]) -> Shaped[Array, "*L B K S h"]:
        room = [(0, 0)] * a.ndim
        room[-2] = 0, columns - a.shape[-2]
        return jnp.pad(jnp.take(a, follows, axis=a.ndim - 4), room)

    return jax.tree.map(one, held)


def each(of: Shaped[Array, "G ..."], follows: Int[Array, " B"]) -> Shaped[Array, "B ..."]:
    """What each row's prefix has. One prefix is not gathered but spread out."""
    if len(of) == 1:
        return jnp.broadcast_to(of, (len(follows), *of.shape[1:]))
    return of[follows]


def behind(prefix: KeysValues, own: KeysValues) -> KeysValues:
    """Rows' own keys and values, [B, K, T, h], behind those of a prefix, [K, P, h] or a row's."""
    keys, values = (
        jnp.concatenate([jnp.broadcast_to(old, (*new.shape[:2], *old.shape[-2:])), new], axis=-2)
        for old, new in zip(prefix, own, strict=True)
    )
    return keys, values
